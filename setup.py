"""Maps the root folders into one namespace: ``compiler/`` is the package ``luthier``, ``ir/`` is ``luthier.ir``, and so on.

Everything else about the distribution stands in ``pyproject.toml``.
"""

from setuptools import find_packages, setup

FOLDERS = {"luthier": "compiler"} | {f"luthier.{name}": name for name in ("ir", "passes", "schedules", "codegen", "tuner")}

packages: list[str] = []
for package, folder in FOLDERS.items():
    packages += [package, *(f"{package}.{sub}" for sub in find_packages(folder))]

setup(
    packages=packages,
    package_dir=FOLDERS,
    package_data={"": ["py.typed", "*.ll", "*.h", "*.c", "*.cpp", "*.js", "*.mjs", "*.html", "*.css", "*.json", "*.txt", "templates/*.j2"]},
)
