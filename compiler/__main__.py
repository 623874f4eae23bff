"""``python -m luthier`` is the command ``luthier``."""

from luthier.cli import main

if __name__ == "__main__":
    main()
