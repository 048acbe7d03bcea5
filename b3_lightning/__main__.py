"""``python -m b3_lightning``."""

from b3_lightning.cli import main

if __name__ == "__main__":
    main()
