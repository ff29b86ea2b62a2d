"""What a model card says of a method's paper."""


def arxiv(number: str, title: str, key: str, author: str, year: int, booktitle: str = "") -> dict[str, str]:
    """Title, number and BibTeX entry of a paper on arXiv, as TRL's trainers have them in `_paper`."""
    kind, venue = ("inproceedings", f"    booktitle    = {{{booktitle}}},\n") if booktitle else ("article", "")
    citation = (
        f"@{kind}{{{key},\n"
        f"    title        = {{{{{title}}}}},\n"
        f"    author       = {{{author}}},\n"
        f"    year         = {year},\n"
        f"{venue}"
        f"    eprint       = {{arXiv:{number}}},\n"
        "}"
    )
    return {"title": title, "id": number, "citation": citation}
