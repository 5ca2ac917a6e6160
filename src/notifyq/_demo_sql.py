"""What the demo does to its own table; the table's trigger sends the job."""

from typing import LiteralString

INSERT_ORDER: LiteralString = "insert into orders (item) values (%s)"
