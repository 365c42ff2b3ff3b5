"""The built-in implementations, slow and right, registered through the same hooks as strangers'."""

from __future__ import annotations

from pi2.api import API_VERSION, Backend, CachePolicy, ModelFormat, Predictor, StorageTier
from pi2.hookspecs import hookimpl

PI2_API_VERSION = API_VERSION


@hookimpl
def pi2_backends() -> list[type[Backend]]:
    from pi2.builtin.numpy_backend import NumpyBackend

    return [NumpyBackend]


@hookimpl
def pi2_storage_tiers() -> list[type[StorageTier]]:
    from pi2.builtin.mmap_tier import MmapTier

    return [MmapTier]


@hookimpl
def pi2_predictors() -> list[type[Predictor]]:
    from pi2.builtin.exact_predictor import ExactPredictor
    from pi2.builtin.lookahead_predictor import LookaheadPredictor
    from pi2.builtin.lowrank_predictor import LowRankPredictor
    from pi2.builtin.oracle_predictor import OraclePredictor
    from pi2.builtin.threshold_predictor import ThresholdPredictor

    return [ExactPredictor, LookaheadPredictor, LowRankPredictor, OraclePredictor, ThresholdPredictor]


@hookimpl
def pi2_cache_policies() -> list[type[CachePolicy]]:
    from pi2.builtin.clock_policy import ClockPolicy
    from pi2.builtin.lfu_policy import LfuPolicy
    from pi2.builtin.lru_policy import LruPolicy
    from pi2.builtin.quota_policy import QuotaPolicy
    from pi2.builtin.s3fifo_policy import S3FifoPolicy
    from pi2.builtin.window_policy import WindowPolicy

    return [ClockPolicy, LfuPolicy, LruPolicy, QuotaPolicy, S3FifoPolicy, WindowPolicy]


@hookimpl
def pi2_model_formats() -> list[type[ModelFormat]]:
    from pi2.formats.gguf_source import GgufFormat
    from pi2.formats.huggingface import HuggingFaceFormat

    return [GgufFormat, HuggingFaceFormat]
