"""The catalogue: the 158 rows of the reading list and one card per paper, as data in the package.

Reading it imports neither torch nor any part. ``rows()`` and ``cards()`` give everything, ``row(4)`` and
``card("soap")`` one of them, ``search("learning rate warmup")`` what mentions all the words. What works
today is computed, never stored: ``metier.catalog.status``.
"""

from metier.catalog.data import Card, Catalog, Row, card, cards, load, row, rows, search

__all__ = ["Card", "Catalog", "Row", "card", "cards", "load", "row", "rows", "search"]
