"""The catalogue: the 38 methods of Scientific Spaces (科学空间) that kexue implements, one row each.

A row names things by dotted path as strings, so that this module imports nothing: `kexue methods` and the tests
compute the state of a row (importable, reproduced, page present) from the code itself.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

__all__ = ["METHODS", "Method", "State", "state"]


@dataclass(frozen=True)
class Method:
    """One row of the catalogue.

    Attributes:
        slug: Short name used in file names and on the command line.
        name: English name.
        name_zh: Chinese name.
        article: Number of the article on Scientific Spaces.
        names: Dotted paths of the public names, for example ``"kexue.words.PMIEmbedding"``.
    """

    slug: str
    name: str
    name_zh: str
    article: int
    names: tuple[str, ...]

    @property
    def page(self) -> str:
        """Path of the documentation page, relative to ``docs/``."""
        return f"methods/{self.slug}.md"

    @property
    def module(self) -> str:
        """Dotted path of the module that reproduces the method's claim."""
        return f"kexue.reproduce.{self.slug.replace('-', '_')}"


@dataclass(frozen=True)
class State:
    """What exists for a method, computed from the code.

    Attributes:
        importable: Every public name of the row can be imported.
        reproduced: The row has a module that re-measures its claim.
        page: The documentation page exists, in English and in Chinese.
        missing: The public names that cannot be imported yet.
    """

    importable: bool
    reproduced: bool
    page: bool
    missing: tuple[str, ...]


def _resolves(path: str) -> bool:
    module, _, name = path.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            return False
        raise


def _has_page(method: Method) -> bool:
    installed = Path(__file__).parent / "_pages"  # in a wheel; in a checkout the pages lie in docs/methods
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "docs" / "methods"
    return (folder / f"{method.slug}.md").is_file() and (folder / f"{method.slug}.zh.md").is_file()


def state(method: Method) -> State:
    """Look up what exists for a method.

    Args:
        method: A row of :data:`METHODS`.

    Returns:
        Its :class:`State`. Importing the public names may import torch.

    Example:
        >>> state(METHODS["flatnce"]).importable
        True
    """
    missing = tuple(name for name in method.names if not _resolves(name))
    return State(
        importable=not missing,
        reproduced=importlib.util.find_spec(method.module) is not None,
        page=_has_page(method),
        missing=missing,
    )


_ROWS = (
    Method(
        "geometric-word-vectors",
        "PMI word vectors (simpler GloVe)",
        "几何词向量",
        4671,  # 更别致的词向量模型(三):描述相关的模型
        ("kexue.words.CooccurrenceCounter", "kexue.words.PMIEmbedding"),
    ),
    Method(
        "sentence-templates",
        "word discovery, sentence templates and structure by minimum entropy",
        "最小熵句模版",
        5577,  # 最小熵原理(三):“飞象过河”之句模版和语言结构
        (
            "kexue.words.NGramCounter",
            "kexue.words.WordDiscovery",
            "kexue.words.Segmenter",
            "kexue.words.PhraseMiner",
            "kexue.words.TemplateMiner",
            "kexue.words.TemplateParser",
            "kexue.words.merge_gain",
        ),
    ),
    Method(
        "linear-attention",
        "linear attention and its normalised kernels",
        "线性注意力",
        7546,  # 线性Attention的探索:Attention必须有个Softmax吗?
        (
            "kexue.attention.linear_attention",
            "kexue.attention.LinearAttention",
            "kexue.attention.LinearAttentionState",
            "kexue.attention.register_attention",
        ),
    ),
    Method(
        "performer",
        "positive orthogonal random features (FAVOR+)",
        "Performer 随机投影注意力",
        7921,  # Performer:用随机投影将Attention的复杂度线性化
        ("kexue.attention.FavorFeatures",),
    ),
    Method(
        "infinite-dimensional-attention",
        "softmax attention as infinite-dimensional linear attention",
        "无限维线性注意力",
        8601,  # Transformer升级之路:5、作为无限维的线性Attention
        ("kexue.attention.TaylorFeatures", "kexue.attention.ExpPowerFeatures"),
    ),
    Method(
        "entropy-invariant-softmax",
        "entropy-invariant softmax scale",
        "熵不变性 Softmax",
        9034,  # 熵不变性Softmax的一个快速推导
        ("kexue.attention.entropy_invariant_attention", "kexue.attention.entropy_invariant_scale"),
    ),
    Method(
        "gated-attention-softmax",
        "gated attention unit with softmax; length generalisation",
        "门控注意力与 Softmax",
        9019,  # 听说Attention与Softmax更配哦~
        (
            "kexue.attention.GatedAttentionUnit",
            "kexue.models.GAUAlphaConfig",
            "kexue.models.GAUAlphaModel",
            "kexue.models.GAUAlphaForMaskedLM",
        ),
    ),
    Method(
        "realformer",
        "residual attention scores",
        "RealFormer 残差注意力",
        8027,  # RealFormer:把残差转移到Attention矩阵上面去
        ("kexue.attention.residual_attention", "kexue.attention.residual_attention_step"),
    ),
    Method(
        "hierarchical-positions",
        "hierarchical decomposition of position embeddings",
        "层次分解位置编码",
        7947,  # 层次分解位置编码,让BERT可以处理超长文本
        (
            "kexue.models.extend_positions",
            "kexue.models.HierarchicalPositionEmbedding",
            "kexue.models.hierarchical_positions",
        ),
    ),
    Method(
        "transformer-initialization",
        "initialization, parameterization, normalization of Transformers",
        "Transformer 的初始化、参数化与标准化",
        8620,  # 浅谈Transformer的初始化、参数化与标准化
        (
            "kexue.models.truncated_normal_",
            "kexue.models.variance_scaling_",
            "kexue.models.initialize_model",
            "kexue.models.NTKLinear",
            "kexue.models.probe",
        ),
    ),
    Method(
        "non-square-initialization",
        "dimension averaging for non-square matrices",
        "非方阵初始化的维度平均",
        8725,  # 初始化方法中非方阵的维度平均策略思考
        ("kexue.models.variance_scaling_", "kexue.models.predict_gain"),
    ),
    Method(
        "bert-initial-std",
        "why 0.02: gradient flow at initialization",
        "BERT 的初始标准差",
        8747,  # 模型优化漫谈:BERT的初始标准差为什么是0.02?
        ("kexue.models.skip_gain", "kexue.models.probe"),
    ),
    Method(
        "lossless-growth",
        "growing a Transformer without changing its function",
        "无损放大 Transformer",
        8444,  # 我们可以无损放大一个Transformer模型吗(一)
        ("kexue.models.grow", "kexue.models.verify_growth"),
    ),
    Method(
        "layerwise-learning-rates",
        "layerwise learning rates and free gradients",
        "分层学习率与自由梯度",
        6418,  # “让Keras更酷一些!”:分层的学习率和自由的梯度
        (
            "kexue.training.param_groups",
            "kexue.training.gradient_transform",
            "kexue.training.clip_norm",
            "kexue.training.clip_value",
            "kexue.training.scale_lr_",
        ),
    ),
    Method(
        "optimizer-dynamics",
        "optimizers as dynamical systems",
        "优化算法的动力学视角",
        6261,  # 从动力学角度看优化算法(三):一个更整体的视角
        ("kexue.training.GradientFlow", "kexue.training.steepest_direction"),
    ),
    Method(
        "simsiam-dynamics",
        "why SimSiam does not collapse",
        "SimSiam 不退化的动力学",
        7980,  # 从动力学角度看优化算法(六):为什么SimSiam不退化?
        ("kexue.models.SimSiam", "kexue.models.CollapseMeter"),
    ),
    Method(
        "path-kernel",
        "SGD as a kernel machine; training-data attribution",
        "SGD 路径核",
        8009,  # 从动力学角度看优化算法(七):SGD ≈ SVM?
        ("kexue.explain.PathKernel",),
    ),
    Method(
        "mlm-dropout",
        "MLM and MAE as dropout; DropToken",
        "MLM 与 MAE 的 Dropout 视角",
        8770,  # Dropout视角下的MLM和MAE:一些新的启发
        ("kexue.models.correct_mask_embedding", "kexue.models.uncorrect_mask_embedding", "kexue.models.DropToken"),
    ),
    Method(
        "one-pass-mlm",
        "one-pass masked language model (T-TA)",
        "一次前向的 MLM",
        7661,  # 修改Transformer结构,设计一个更快更好的MLM模型
        (
            "kexue.models.KexueConfig",
            "kexue.models.KexueModel",
            "kexue.models.KexueForTextAutoencoding",
            "kexue.models.KexueForMaskedLM",
            "kexue.models.KexueForCausalLM",
        ),
    ),
    Method(
        "nsp-zero-shot",
        "zero-shot learning by next sentence prediction",
        "NSP 零样本学习",
        8671,  # NSP-BERT (NSP的Zero Shot)
        ("kexue.tasks.NSPZeroShotClassifier", "kexue.tasks.SamplesContrast"),
    ),
    Method(
        "cpm-gpt2",
        "a large Chinese GPT-2 (CPM-LM): tokenizer, loading, fast decoding",
        "中文 GPT2：CPM-LM",
        7912,  # 跟风玩玩目前最大的中文GPT2模型(bert4keras)
        ("kexue.generation.load_causal_lm", "kexue.generation.CPMTokenizer", "kexue.generation.few_shot"),
    ),
    Method(
        "search-sampling",
        "text generation by search and sampling",
        "从文本生成到搜索采样",
        8062,  # 【搜出来的文本】(一)从文本生成到搜索采样
        (
            "kexue.generation.Target",
            "kexue.generation.CGMH",
            "kexue.generation.MLMGibbs",
            "kexue.generation.SimulatedAnnealing",
            "kexue.generation.RejectionSampler",
            "kexue.generation.ImportanceSampler",
            "kexue.generation.transition_matrix",
        ),
    ),
    Method(
        "sentence-similarity",
        "sentence similarity as classification, then retrieval",
        "句子相似度模型",
        5743,  # 基于GRU和AM-Softmax的句子相似度模型
        ("kexue.tasks.SentenceSimilarity", "kexue.tasks.retrieval_report", "kexue.models.CharGRUEncoder"),
    ),
    Method(
        "margin-softmax",
        "margin softmax from the triangle inequality",
        "Margin Softmax",
        8656,  # 从三角不等式到Margin Softmax
        ("kexue.losses.margin_softmax_loss", "kexue.losses.MarginSoftmax", "kexue.losses.class_diameter"),
    ),
    Method(
        "multilabel-softmax",
        "softmax + cross-entropy for multi-label (ZLPR)",
        "多标签 Softmax 交叉熵",
        7359,  # 将“Softmax+交叉熵”推广到多标签分类问题
        ("kexue.losses.zlpr_loss", "kexue.losses.ZLPRLoss", "kexue.losses.unified_pair_loss"),
    ),
    Method(
        "multilabel-soft-labels",
        "soft-label version of ZLPR",
        "多标签交叉熵的软标签版本",
        9064,  # 多标签“Softmax+交叉熵”的软标签版本
        ("kexue.losses.zlpr_loss", "kexue.losses.zlpr_proba", "kexue.losses.mixup_multilabel"),
    ),
    Method(
        "flatnce",
        "FlatNCE: small-batch contrastive learning without rounding loss",
        "FlatNCE",
        8586,  # FlatNCE
        (
            "kexue.losses.info_nce",
            "kexue.losses.nt_xent",
            "kexue.losses.flat_cross_entropy",
            "kexue.losses.FlatNCELoss",
            "kexue.losses.contrastive_diagnostics",
        ),
    ),
    Method(
        "smooth-approximations",
        "differentiable approximations of non-differentiable functions",
        "函数光滑化",
        6620,  # 函数光滑化杂谈:不可导函数的可导逼近
        (
            "kexue.losses.smooth_max",
            "kexue.losses.smooth_abs",
            "kexue.losses.smooth_step",
            "kexue.losses.soft_argmax",
            "kexue.losses.soft_topk",
            "kexue.losses.smooth_accuracy_loss",
            "kexue.losses.smooth_f1_loss",
            "kexue.losses.SmoothF1Loss",
        ),
    ),
    Method(
        "reparameterization",
        "from the normal distribution to Gumbel-Softmax",
        "重参数与 Gumbel Softmax",
        6705,  # 漫谈重参数:从正态分布到Gumbel Softmax
        (
            "kexue.stats.gumbel_softmax",
            "kexue.stats.gumbel_max",
            "kexue.stats.score_function_loss",
            "kexue.stats.rsample_normal",
            "kexue.stats.TemperatureSchedule",
            "kexue.stats.gradient_stats",
        ),
    ),
    Method(
        "gaussian-divergences",
        "KL, Bhattacharyya and Wasserstein distances of Gaussians",
        "正态分布间的散度与距离",
        8512,  # 两个多元正态分布的KL散度、巴氏距离和W距离
        (
            "kexue.stats.Gaussian",
            "kexue.stats.kl",
            "kexue.stats.bhattacharyya",
            "kexue.stats.hellinger",
            "kexue.stats.w2",
            "kexue.stats.ot_map",
            "kexue.stats.barycenter",
            "kexue.stats.frechet_distance",
            "kexue.stats.FrechetAccumulator",
        ),
    ),
    Method(
        "common-sector",
        "probability that n points of a disc share a sector of angle θ",
        "圆内 n 点同扇形概率",
        9324,  # 圆内随机n点在同一个圆心角为θ的扇形的概率
        (
            "kexue.stats.common_sector",
            "kexue.stats.common_sector_probability",
            "kexue.stats.smallest_sector",
            "kexue.stats.circular_range_test",
        ),
    ),
    Method(
        "analytic-logistic-regression",
        "closed-form logistic regression and softmax classifier",
        "有解析解的逻辑回归",
        8578,  # 概率视角下的线性模型:逻辑回归有解析解吗?
        (
            "kexue.stats.AnalyticLogisticRegression",
            "kexue.stats.AnalyticLogisticRegressionCV",
            "kexue.stats.analytic_head_",
        ),
    ),
    Method(
        "capsule-routing",
        "capsules as K-means clustering",
        "胶囊与 K-Means",
        5112,  # 再来一顿贺岁宴:从K-Means到Capsule
        (
            "kexue.models.Capsule",
            "kexue.models.CapsulePooler",
            "kexue.models.capsule_routing",
            "kexue.models.squash",
            "kexue.losses.capsule_margin_loss",
        ),
    ),
    Method(
        "wasserstein-duality",
        "Wasserstein distance, its dual, and WGAN",
        "Wasserstein 距离与对偶",
        6280,  # 从Wasserstein距离、对偶理论到WGAN
        (
            "kexue.stats.transport",
            "kexue.stats.wasserstein",
            "kexue.stats.sinkhorn",
            "kexue.stats.certificate",
            "kexue.stats.kr_potential",
        ),
    ),
    Method(
        "gradient-normalization",
        "Lipschitz critics by gradient normalization",
        "梯度归一化的 L 约束",
        8757,  # WGAN新方案:通过梯度归一化来实现L约束
        (
            "kexue.adversarial.LipschitzCritic",
            "kexue.adversarial.gradient_normalize",
            "kexue.adversarial.gradient_penalty",
            "kexue.adversarial.lipschitz_report",
        ),
    ),
    Method(
        "bigan-qp",
        "GAN-QP and BiGAN-QP: encode and generate",
        "BiGAN-QP",
        6214,  # BiGAN-QP:简单清晰的编码&生成模型
        ("kexue.adversarial.QPLoss", "kexue.adversarial.BiGANQP", "kexue.adversarial.rank_gans"),
    ),
    Method(
        "integrated-gradients",
        "integrated gradients",
        "积分梯度",
        7533,  # 积分梯度:一种新颖的神经网络可视化方法
        ("kexue.explain.integrated_gradients", "kexue.explain.explain_text"),
    ),
    Method(
        "spaces-summarization",
        "extract-then-generate long-document summarization",
        "SPACES 抽取-生成式摘要",
        8046,  # SPACES:“抽取-生成”式长文本摘要(法研杯总结)
        (
            "kexue.tasks.Summarizer",
            "kexue.tasks.GatedConvLabeler",
            "kexue.tasks.rouge",
            "kexue.tasks.align_extract",
            "kexue.losses.sparse_softmax",
            "kexue.losses.SparseCrossEntropyLoss",
            "kexue.losses.LinearSparseCrossEntropyLoss",
            "kexue.generation.CopyLogitsProcessor",
        ),
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.slug: method for method in _ROWS})
"""Ordered mapping from slug to :class:`Method`."""
