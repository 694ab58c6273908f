"""Contract suites, one per kind: ``check_part("optimizer/soap")`` runs the suite of the part's kind.

Third parties use them on their own parts; ``metier check PART`` does the same from the command line.
"""

import importlib

from metier.core.part import find


def check_part(ref: str) -> list[str]:
    """Run the contract suite of a part's kind. Returns the names of the checks that ran; raises
    ``AssertionError``.
    """
    item = find(ref)
    suite = importlib.import_module(f"metier.testing.{item.kind}")
    return suite.check(item.id)
