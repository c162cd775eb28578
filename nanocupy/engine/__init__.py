"""Requests in, tokens out: the loop, its scheduler, and the runners that execute a schedule."""
