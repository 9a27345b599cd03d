"""The tokenize job: its configuration, and what all its tasks have to agree on before one writes a shard."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import Field, NonNegativeInt, PositiveInt

from data_prep.kept import KeptListing, forget
from mvar.config import DeviceChoice
from mvar.data.manifest import JOB, QUANTIZER, FileInfo, SourceInfo, TokenizerInfo
from mvar.errors import MvarError, StoreError
from mvar.files.disk import make_folder, sha256_of, write_file
from mvar.images.layouts import Kind, open_images
from mvar.images.pixels import Background, GreyBits, Orientation, Rules
from mvar.images.sources import Contents, Source
from mvar.images.views import RESIZE, HFlip, ViewPlan
from mvar.run.tasks import differences
from mvar.settings import Fraction, PathOrUrl, Section
from mvar.tokenizer.files import save_quantizer
from mvar.tokenizer.vqvae import VQVAE

FORMAT_VERSION = 1
Precision = Literal["fp32", "tf32", "bf16"]
LAST_RUN = "last-run.json"


class LastRun(pydantic.BaseModel):
    """How the job was last run: names the tasks that have to run again, and limits what may be left out."""

    tasks: int
    skip_bad: int = 0

    def write(self, folder: Path) -> None:
        write_file(folder / LAST_RUN, (self.model_dump_json() + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> LastRun | None:
        try:
            return cls.model_validate_json((folder / LAST_RUN).read_bytes())
        except (OSError, ValueError):
            return None


class ViewsConfig(Section):
    """The views of a training image. A validation image always has one: the centre."""

    random_crops: NonNegativeInt = Field(1, description="random crops of each image")
    center: bool = Field(False, description="add the centre crop")
    ten_crop: bool = Field(False, description="add the centre and the corners, each with its mirror image")
    hflip: HFlip = Field("off", description="both: store the mirror image of every view as well")
    resize: Annotated[float, Field(ge=1.0)] = Field(
        RESIZE, description="shorter side before cropping, in crop sizes (published: 1.125; 1: no margin)"
    )


class TokenizeConfig(Section):
    """Everything `mvar tokenize` can be told."""

    source: PathOrUrl = Field(
        description="folder of class folders, or of train/ and val/; list file; tars, also by URL"
    )
    source_kind: Kind = Field("auto", description="what the source is; auto: seen from its name and content")
    source_cache: Path | None = Field(None, description="folder that keeps copies of tars which lie behind a URL")
    val_labels: Path | None = Field(None, description="lines `file class`, for a val/ without class folders (ImageNet)")
    class_names: Path | None = Field(None, description="a class name a line, where the source has only numbers")
    tokenizer: Path = Field(description="tokenizer file (.safetensors, or the published .pth)")
    store: Path = Field(description="folder of the code store that is made")
    patch_nums: tuple[PositiveInt, ...] | None = Field(
        None, description="sides of the token maps, where the tokenizer's file does not say (published .pth)"
    )
    views: ViewsConfig = Field(default_factory=lambda: ViewsConfig())
    val_fraction: Fraction = Field(0.0, description="share of images held out, where the source has no val/")
    background: Background = Field("white", description="what shows through transparent pixels")
    orientation: Orientation = Field("stored", description="exif: turn pictures as their EXIF data say")
    grey_bits: GreyBits | None = Field(
        None, description="bits of greyscale values deeper than 8, where the files do not tell; the upper 8 are kept"
    )
    seed: NonNegativeInt = Field(0, description="seed of the crops and of the order of images in the store")
    shuffle: bool = Field(True, description="mix the classes within and over the shards, for sequential readers")
    shard_samples: PositiveInt = Field(4096, description="images in a shard, at most")
    batch: PositiveInt = Field(16, description="views encoded at once (part of what makes the codes reproducible)")
    precision: Precision = Field("fp32", description="arithmetic of the encoder; the quantizer's is always fp32")
    compile: bool = Field(False, description="torch.compile the encoder")
    calibration_images: PositiveInt = Field(32, description="images that show what a fast mode costs")
    accept_agreement: Fraction | None = Field(
        None, description="share of codes that a fast mode (tf32, bf16, compile) must have in common with fp32"
    )
    device: DeviceChoice = Field("auto", description="where the encoder runs")
    threads: PositiveInt | None = Field(None, description="CPU threads of the encoder; default: all cores")
    workers: NonNegativeInt | None = Field(None, description="images decoded at once; default: all cores; 0: in line")
    decoders: Literal["threads", "processes"] = Field("threads", description="what the workers are")

    @property
    def is_exact(self) -> bool:
        """Whether the codes are those of plain fp32."""
        return self.precision == "fp32" and not self.compile

    @property
    def rules(self) -> Rules:
        """How files become RGB pictures."""
        return Rules(self.background, self.orientation, self.grey_bits)

    def train_plan(self, size: int) -> ViewPlan:
        """The views of a training image. Raises ConfigError."""
        views = self.views
        return ViewPlan(size, views.resize, views.random_crops, views.center, views.ten_crop, views.hflip)

    def val_plan(self, size: int) -> ViewPlan:
        return ViewPlan(size, self.views.resize, random_crops=0, center=True)


class ShardPlan(NamedTuple):
    """Shard `number` of the whole job: places [first, first + samples) of a split."""

    number: int
    name: str
    split: str
    first: int
    samples: int


class SplitPlan(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)

    samples: int
    views: tuple[str, ...]


class TokenizeJob(pydantic.BaseModel):
    """All that a shard's bytes depend on, besides its number. The first task writes it, the others compare.

    How the job is cut into tasks, decoded and run is not in here, and must not change a byte.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format: Literal["mvar-tokenize-job"] = "mvar-tokenize-job"
    format_version: int = FORMAT_VERSION
    tokenizer: TokenizerInfo
    quantizer: FileInfo
    source: SourceInfo
    classes: tuple[str, ...]
    transform: dict[str, Any]
    encoding: dict[str, Any]
    shard_samples: int
    splits: dict[str, SplitPlan]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()

    def shards(self) -> list[ShardPlan]:
        """All shards of the job, training first; their places in the list are their numbers."""
        plans: list[ShardPlan] = []
        for split, info in self.splits.items():
            for begin in range(0, info.samples, self.shard_samples):
                name = f"{split}-{begin // self.shard_samples:06d}.tar"
                samples = min(self.shard_samples, info.samples - begin)
                plans.append(ShardPlan(len(plans), name, split, begin, samples))
        return plans

    @classmethod
    def read(cls, folder: Path) -> TokenizeJob:
        """The job of a store. Raises StoreError."""
        path = folder / JOB
        try:
            return cls.model_validate(json.loads(path.read_bytes()))
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be read ({error.strerror}). Give the folder that `mvar tokenize` wrote as store=..."
            ) from None
        except ValueError as error:
            raise StoreError(
                f"{path}: not a tokenize job of this version ({str(error).splitlines()[0]}). "
                "Remove it and run the tokenize command again; shards of the same job are kept."
            ) from None


def open_source(config: TokenizeConfig, *, keep: bool = False) -> Source:
    """The images to tokenize, by the listing in the store if it stands; `keep`: else list and keep them there.

    Raises MvarError.
    """

    def kept(asked: dict[str, Any], look: Callable[[], Contents]) -> Contents:
        listing = KeptListing(config.store, asked)
        if keep:
            return listing.once(look, keep=lambda contents: _may_be_listed(config.store, contents))
        return listing.read() or look()

    return open_images(
        config.source,
        config.source_kind,
        val_fraction=config.val_fraction,
        rules=config.rules,
        val_labels=config.val_labels,
        class_names=config.class_names,
        cache=config.source_cache,
        kept=kept,
    )


@contextmanager
def undone_if_refused(store: Path) -> Iterator[None]:
    """A command that is refused before any task has pinned the job leaves nothing in the store's folder."""
    try:
        yield
    except MvarError:
        if not (store / JOB).exists():
            forget(store)
        raise


def _may_be_listed(store: Path, contents: Contents) -> bool:
    """Whether the store is of these images, or of none yet: a command that will be refused changes nothing."""
    return not (store / JOB).exists() or TokenizeJob.read(store).source.sha256 == contents.fingerprint().sha256


def plan_job(config: TokenizeConfig, source: Source, vqvae: VQVAE, quantizer: bytes) -> TokenizeJob:
    """What this configuration makes of this source. Raises StoreError when codes do not fit into 16 bits."""
    if vqvae.vocab_size > 1 << 16:
        raise StoreError(f"tokenizer {config.tokenizer}: {vqvae.vocab_size} words, a store's codes have 16 bits.")
    train, val = config.train_plan(vqvae.image_size), config.val_plan(vqvae.image_size)
    plans = {"train": train, "val": val}
    return TokenizeJob(
        tokenizer=TokenizerInfo(sha256=sha256_of(config.tokenizer), geometry=vqvae.geometry),
        quantizer=FileInfo(name=QUANTIZER, bytes=len(quantizer), sha256=hashlib.sha256(quantizer).hexdigest()),
        source=SourceInfo(**source.fingerprint._asdict()),
        classes=source.classes,
        transform=train.describe() | config.rules.describe(),
        encoding={
            "precision": config.precision,
            "compile": config.compile,
            "batch": config.batch,
            "seed": config.seed,
            "shuffle": config.shuffle,
            "val_fraction": config.val_fraction,
        },
        shard_samples=config.shard_samples,
        splits={
            split: SplitPlan(samples=len(items), views=plans[split].names) for split, items in source.splits.items()
        },
    )


def quantizer_bytes(vqvae: VQVAE) -> bytes:
    """The file of the tokenizer's quantizer that goes into the store: equal weights give equal bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / QUANTIZER
        save_quantizer(path, vqvae.quantizer)
        return path.read_bytes()


def pin(folder: Path, job: TokenizeJob, quantizer: bytes) -> None:
    """Make `job` the store's job, or check that it already is. Raises StoreError that names what differs."""
    make_folder(folder)
    path = folder / JOB
    if not path.exists():
        write_file(path, job.to_json())
    pinned = TokenizeJob.read(folder)
    if pinned.to_json() != job.to_json():
        differing = differences(
            pinned.model_dump(mode="json"), job.model_dump(mode="json"), "the store", "this command"
        )
        raise StoreError(
            f"code store {folder} is being made by another job. Differing: {'; '.join(differing)}. "
            "Run with the same configuration, source and tokenizer, or give another store=..."
        )
    path = folder / QUANTIZER
    if not path.exists() or path.read_bytes() != quantizer:
        write_file(path, quantizer)
