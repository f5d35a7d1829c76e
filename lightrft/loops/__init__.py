"""When things happen: collect, learn, sync, evaluate; each takes protocols as arguments and names no backend."""
