"""A wheel holds what is shipped beside the code inside the package `mvar`; `mvar/shipped.py` finds it in both places.

Everything else about the distribution stands in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = (
    *("ds_configs/*.json", "ds_configs/README.md"),
    "recipes/*.yaml",
    *("slurm/*.sbatch", "slurm/*.sh", "slurm/site.env.example", "slurm/README.md"),
)


class BuildWithShipped(build_py):  # type: ignore[misc]  # setuptools has no types.
    """Copies SHIPPED to mvar/_shipped/. An editable install stays as it is: it reads the checkout."""

    def run(self) -> None:
        if not self.editable_mode:  # What an older build left there would be packed too.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for target, source in self._shipped().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self._shipped().values()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *([] if self.editable_mode else self._shipped())]

    def _shipped(self) -> dict[str, str]:
        """Where it goes -> where it lies."""
        files = (path for pattern in SHIPPED for path in sorted(Path().glob(pattern)))
        return {str(Path(self.build_lib) / "mvar" / "_shipped" / path): str(path) for path in files}


setup(cmdclass={"build_py": BuildWithShipped})
