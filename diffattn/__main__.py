"""`python -m diffattn`."""

from diffattn.cli import main

if __name__ == "__main__":
    main()
