"""`python -m phasequant` is `phasequant`."""

from phasequant.cli import main

if __name__ == "__main__":
    main()
