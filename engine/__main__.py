"""`python -m engine` is `fourbit`, for where its script is not on the path."""

from engine.cli import main

if __name__ == "__main__":
    main()
