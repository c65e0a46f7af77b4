"""A server of rewards over HTTP, run by `engine.serve`. Needs the packages of the extra `serve`."""
