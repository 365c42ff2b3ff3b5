"""pi2 runs large language models on devices whose memory cannot hold them."""

__version__ = "0.1.0"
