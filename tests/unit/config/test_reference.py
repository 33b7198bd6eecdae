"""The configuration reference agrees with the code."""

from pathlib import Path

from flexkv.config.reference import reference


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[3] / "docs" / "configuration.md"
    assert page.read_text() == reference(), "run: flexkv config > docs/configuration.md"
