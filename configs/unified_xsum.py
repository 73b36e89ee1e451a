"""He et al. 2022 on XSum: a frozen BART-large and a method of the unified view.

    pals-jax train --config=configs/unified_xsum.py --workdir=DIR
    pals-jax train --config='configs/unified_xsum.py:scaled_parallel(size=512)' --workdir=DIR
    pals-jax train --config=configs/unified_xsum.py:@XSUM --workdir=DIR

The argument is [METHOD][@XSUM]; the default is the mix-and-match adapter, and XSum from TensorFlow
Datasets. XSUM is a directory with train.jsonl, dev.jsonl and test.jsonl of the keys `document` and
`summary`. Published, with ROUGE-1/2/L on the test set and the share of stored parameters:

    full fine-tuning                                           100%   44.81 / 21.94 / 36.83
    mam(prefix=30, size=512, scale=4.0)                        6.7%   45.06 / 21.90 / 36.87
    scaled_parallel(size=512)                                  6.2%   44.85 / 21.54 / 36.58
    lora(rank=102, alpha=408.0, targets=("ffn_in", "ffn_out")) 6.2%   44.59 / 21.31 / 36.25
    prefix_tuning(length=200, bottleneck=0)                    3.6%   43.40 / 20.46 / 35.51
    adapter(size=512), sequential                              6.2%       - / 20.58 / -
    prompt_tuning(length=200), roughly                        0.05%       - / 15.49 / -
    bitfit()                                                   0.1%       - / 17.32 / -

The authors train a prefix through a network of 800, which is not stored: with bottleneck=800, or
prefix_tuning(length=30) + scaled_parallel(size=512) for the mix-and-match adapter. They keep the
checkpoint with the best ROUGE-2 of 1,600 dev examples; here that with the least loss on all of them
is kept. Not run here: it needs an accelerator, the weights and the data.
"""

from ml_collections import ConfigDict

from pals_jax.config import default


def get_config(argument: str = "") -> ConfigDict:
    """100,000 steps of 64 articles; the rate falls to 0 and not, as the authors', to 1e-7."""
    method, _, directory = argument.partition("@")
    config = default()
    config.encoder = "facebook/bart-large"
    config.method = method or "mam(prefix=30, size=512, scale=4.0)"
    config.trainable = ("adapters/",)
    config.dtype = "bfloat16"
    config.tasks = ("xsum",)
    if directory:
        files = {split: f"{directory}/{split}.jsonl" for split in ("train", "dev", "test")}
        config.data.own = ConfigDict({"xsum": {**files, "text": "document", "target": "summary"}})
    config.data.max_length = 512
    config.data.max_target_length = 128
    config.epochs, config.steps_per_epoch = 40, 2500
    config.batch_size = 64
    config.label_smoothing = 0.1
    config.generation.num_beams = 6
    config.generation.max_length, config.generation.min_length = 60, 10
    config.generation.no_repeat_ngram_size = 3
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup = 0.0
    config.optimizer.eps = 1e-8
    config.optimizer.clip = 0.1
    return config
