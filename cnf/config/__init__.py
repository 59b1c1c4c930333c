"""Settings of a run, presets and published models; importing them needs neither torch nor tyro."""

from cnf._utils.aliases import aliases
from cnf.config.fields import (
    AugmentedTimeConfig,
    ConvConfig,
    FieldConfig,
    GeneratingTimeConfig,
    HypernetConfig,
    MLPConfig,
    PlainTimeConfig,
    PredictorConvConfig,
    PredictorMLPConfig,
    UNetConfig,
)
from cnf.config.files import read_settings
from cnf.config.model import (
    PREDICTIVE,
    CenterConfig,
    ConditionalMixtureBaseConfig,
    ConstantDepthConfig,
    FlowConfig,
    LogitConfig,
    MarginalsConfig,
    MixtureBaseConfig,
    NeuralODEConfig,
    NormalBaseConfig,
    ResNetConfig,
    VaryingDepthConfig,
)
from cnf.config.objective import BothConfig, ClassificationConfig, LikelihoodConfig, MatchingConfig, RegressionConfig
from cnf.config.presets import PRESETS, preset
from cnf.config.published import AFFJORD, FFJORD, PUBLISHED, RNODE, Published
from cnf.config.settings import DataConfig, Preset, RunConfig, TrainConfig
from cnf.config.solver import (
    AdamsConfig,
    AdaptiveConfig,
    AdaptiveLikelihoodConfig,
    ExactConfig,
    GridConfig,
    HutchinsonConfig,
    SolverConfig,
)

__all__ = [
    "AFFJORD",
    "FFJORD",
    "PREDICTIVE",
    "PRESETS",
    "PUBLISHED",
    "RNODE",
    "AdamsConfig",
    "AdaptiveConfig",
    "AdaptiveLikelihoodConfig",
    "AugmentedTimeConfig",
    "BothConfig",
    "CenterConfig",
    "ClassificationConfig",
    "ConditionalMixtureBaseConfig",
    "ConstantDepthConfig",
    "ConvConfig",
    "DataConfig",
    "ExactConfig",
    "FieldConfig",
    "FlowConfig",
    "GeneratingTimeConfig",
    "GridConfig",
    "HutchinsonConfig",
    "HypernetConfig",
    "LikelihoodConfig",
    "LogitConfig",
    "MLPConfig",
    "MarginalsConfig",
    "MatchingConfig",
    "MixtureBaseConfig",
    "NeuralODEConfig",
    "NormalBaseConfig",
    "PlainTimeConfig",
    "PredictorConvConfig",
    "PredictorMLPConfig",
    "Preset",
    "Published",
    "RegressionConfig",
    "ResNetConfig",
    "RunConfig",
    "SolverConfig",
    "TrainConfig",
    "UNetConfig",
    "VaryingDepthConfig",
    "preset",
    "read_settings",
]

__getattr__ = aliases(__name__, ModelConfig="cnf.config.former.model_config")
