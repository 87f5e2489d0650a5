"""A run as one HTML file that opens from disk: what researchers look at a run with.

`write_page` reads a store into plain data and puts them, the charting library, the program and the
style into a single file, from which no request ever leaves.
"""

from elm_lanczos.report.page.build import page, write_page

__all__ = ["page", "write_page"]
