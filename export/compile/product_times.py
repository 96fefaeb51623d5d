"""What `compile` timed of a product: one time out of it, and the table that `compile` and `inspect` show.

Without torch, which takes a second to import and shows nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from stillgraph.compiled import Form, Products, ProductTime


def ms_of(times: Iterable[ProductTime], form: Form, rows: int) -> float:
    """Raises StopIteration for what was not timed."""
    return next(found.ms for found in times if (found.form, found.rows) == (form, rows))


def product_table(products: Products) -> Table:
    """Times by form and tokens, and which graph has the form."""
    n, k = products.shape
    times = products.times
    counts = sorted({found.rows for found in times})
    title = f"one product of {n} by {k} weights on this CPU, ms"
    table = Table("form", *(f"{count} token{'s' * (count > 1)}" for count in counts), "graphs", title=title)
    for form in dict.fromkeys(found.form for found in times):
        graphs = [name for name, chosen in products.chosen.items() if chosen == form]
        cells = (f"{ms_of(times, form, count):.3f}" for count in counts)
        table.add_row(form, *cells, ", ".join(graphs))
    table.caption = products.advice
    return table
