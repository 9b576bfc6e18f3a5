"""Draw the pictures of docs/ and write the tables of README.md and docs/: `python -m report`."""

from __future__ import annotations

from report import figures
from report.pages import filled, pages


def main() -> None:
    figures.draw()
    for page, text in pages().items():
        page.write_text(filled(text))


if __name__ == "__main__":
    main()
