"""``python -m luthier`` is the command ``luthier``."""

from luthier.cli.commands import main

if __name__ == "__main__":
    main()
