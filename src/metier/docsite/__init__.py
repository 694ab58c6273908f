"""The documentation site, generated from docstrings, signatures, the catalogue and the findings.

:func:`pages` gives every page as Markdown, :func:`write` puts them in a folder, :func:`build` makes the site
with mkdocs-material (extra ``docs``). Generated pages are never committed: the code and the catalogue are the
source.
"""

from metier.docsite.build import build, pages, write
from metier.docsite.facts import Facts, gather

__all__ = ["Facts", "build", "gather", "pages", "write"]
