"""The server: the tasks of a run over HTTP, in one process."""
