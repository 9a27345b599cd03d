"""Splits by the names that folders and tars usually have: train, Validation, test2017, ..."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from mvar.errors import ImageError
from mvar.images.walk import Walk, printable

Role = Literal["train", "val", "test"]
_NAMES: dict[str, Role] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_FOLDER = re.compile(rf"({'|'.join(_NAMES)})([-_. ]?(set|data|images?|split))?[-_. ]?\d*", re.IGNORECASE)
_WORD = re.compile(r"(?:^|[-_.])(val|valid|validation|test|testing)(?=[-_.]|\d|$)", re.IGNORECASE)


def role_of(name: str) -> Role | None:
    """The split that a folder's name (or a word of a list) stands for, if it is the name of one."""
    match = _FOLDER.fullmatch(name)
    return None if match is None else _NAMES[match[1].lower()]


def role_in(stem: str) -> Role:
    """The split that a tar belongs to: the first word of its name that is val or test, in any spelling, else train."""
    match = _WORD.search(stem)
    return "train" if match is None else _NAMES[match[1].lower()]


def split_folders(walk: Walk) -> dict[str, Path]:
    """The folders of `train` and perhaps `val`, whose sub-folders are classes; `train` may be the root itself.

    Folders are splits if they are called so and hold folders, and classes if they are called otherwise. Raises
    ImageError that names the folder where both can be meant, or a split is there twice.
    """
    root = walk.root
    folders = dict(walk.folders(root))
    roles = {name: role for name in folders if (role := role_of(name)) is not None}
    others = [name for name in folders if name not in roles]
    nested = [name for name in roles if walk.folders(folders[name])]
    if not nested:
        if roles and not others:
            raise _refusal(root, list(roles), "is called like a split, but holds no class folders")
        for name in roles:
            walk.remarks.append(
                f"folder {printable(name)} is called like a split, but taken for a class: like the classes beside it, "
                "it holds no folders"
            )
        walk.leave_out_files(root)
        return {"train": root}
    train, val = ([name for name in roles if roles[name] == role] for role in ("train", "val"))
    if not train:
        raise _refusal(root, nested, "is called like a split and holds folders, but there is none for training")
    for names in (train, val):
        if len(names) > 1:
            raise _refusal(root, names, "are the same split")
    if train[0] not in nested:
        raise _refusal(root, train, f"holds no class folders, but {printable(nested[0])} beside it does")
    for name in others:
        if walk.holds_image(folders[name]):
            raise _refusal(root, [name], f"holds images and lies beside {printable(train[0])}: a class, or a split?")
        walk.left_out.add("a folder without pictures beside the splits", name)
    for name in roles:
        if roles[name] == "test":
            walk.left_out.add("a split for tests", name)
    walk.leave_out_files(root)
    walk.leave_out_files(folders[train[0]])
    return {split: folders[names[0]] for split, names in (("train", train), ("val", val)) if names}


def _refusal(root: Path, names: list[str], what: str) -> ImageError:
    shown = ", ".join(printable(name) for name in names)
    return ImageError(
        f"image folder {root}: {shown} {what}. Expected class folders alone, or train/ and perhaps val/ and test/ with "
        "class folders in them. Rename or move it; where you cannot, point to a folder of links, or to a list file."
    )
