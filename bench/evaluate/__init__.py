"""The public benchmarks of reward models, each by one command: `python -m bench.evaluate`."""
