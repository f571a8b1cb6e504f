"""Tables, and the parts of docs/results.md that programs write between two marks."""


def as_table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def fill_between(page: str, begin: str, end: str, text: str) -> str:
    """The page with what stands between its two marks written anew."""
    head, mark, rest = page.partition(begin)
    assert mark, f"the page has no {begin}"
    return f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
