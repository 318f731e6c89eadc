"""The page: a sparsity report as one HTML file, which works offline and asks for nothing from elsewhere."""

from cda_cli.page.collect import PageCollector, live_heads, page_content
from cda_cli.page.page import PageContent, bytes_for_rows, write_page

__all__ = ["PageCollector", "PageContent", "bytes_for_rows", "live_heads", "page_content", "write_page"]
