"""Any engine in a process of its own: how it is started and asked, and how weights reach it."""
