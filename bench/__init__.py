"""Benchmarks of mmjax beside its PyTorch peers: same machine, same run, same weights and inputs."""
