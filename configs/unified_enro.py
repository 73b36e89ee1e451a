"""He et al. 2022 on WMT16 English-Romanian: a frozen mBART-large and a method of the unified view.

    pals-jax train --config=configs/unified_enro.py --workdir=DIR
    pals-jax train --config='configs/unified_enro.py:lora(rank=200, alpha=400.0)' --workdir=DIR

The argument is the method; the default is the mix-and-match adapter. Published, with BLEU on the
test set and the share of stored parameters:

    full fine-tuning                                           100%   37.3
    mam(prefix=30, size=512, scale=4.0)                        4.5%   37.5
    scaled_parallel(size=512)                                  4.1%   37.1 (parallel)
    lora(rank=102, alpha=408.0, targets=("ffn_in", "ffn_out")) 4.1%   36.5
    lora(rank=200, alpha=400.0), at attention                  4.8%   36.2
    prefix_tuning(length=200, bottleneck=0)                    2.4%   35.6
    adapter(size=512), sequential                              4.1%   36.3
    bitfit()                                                  0.05%   26.4

The shares here are of mBART's parameters, with its 250,027 words. On prefixes and their networks
see configs/unified_xsum.py. A batch of the authors has four parts of up to 4,096 tokens, padded;
here it has 320 pairs, about as many tokens if the longer text of a pair has 50. The authors compute
BLEU after Romanian normalisation and without diacritics. Not run here: it needs an accelerator, the
weights and the data.
"""

from ml_collections import ConfigDict

from pals_jax.config import default


def get_config(method: str = "") -> ConfigDict:
    """50,000 steps; the checkpoint with the least loss on dev is kept."""
    config = default()
    config.encoder = "facebook/mbart-large-cc25"
    config.method = method or "mam(prefix=30, size=512, scale=4.0)"
    config.trainable = ("adapters/",)
    config.dtype = "bfloat16"
    config.tasks = ("wmt16_enro",)
    config.data.max_length = config.data.max_target_length = 150
    config.epochs, config.steps_per_epoch = 10, 5000
    config.batch_size = 320
    config.label_smoothing = 0.1
    config.generation.num_beams = 5
    config.generation.max_length, config.generation.min_length = 150, 1
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup = 0.0
    config.optimizer.b2 = 0.98
    return config
