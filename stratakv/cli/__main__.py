"""`python -m stratakv.cli`."""

from stratakv.cli import main

if __name__ == "__main__":
    main()
