"""`python -m elm_lanczos` is `elm-lanczos`."""

from elm_lanczos.cli import main

if __name__ == "__main__":
    main()
