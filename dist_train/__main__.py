"""`python -m dist_train` is the same program as `dist-train`."""

from dist_train.cli import main

if __name__ == "__main__":
    main()
