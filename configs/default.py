"""The ImageNet recipe of the published CoTNet models, every field with its meaning.

Not run by itself: each file beside this one takes it and changes what differs.
Source: Li et al., "Contextual Transformer Networks for Visual Recognition",
arXiv 2107.12292, section 4.1, and the settings published with the models.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    # Everything random (initial weights, order, augmentation, mixing, dropout) follows from this.
    config.seed = 42
    # Passes over the training split.
    config.epochs = 350
    # Steps between evaluations, each with a checkpoint; 0: every config.eval.every_epochs epochs.
    config.steps_per_eval = 0
    # Images a step, summed over all devices and all accumulated parts.
    config.batch_size = 640
    # A step's batch is worked through in this many parts, one after the other.
    config.accumulate_steps = 1
    # Weights to start from: a converted folder, a workdir (its best checkpoint) or one step of it
    # (WORKDIR/checkpoints/STEP), or a PyTorch file; "" is from scratch.
    config.init_from = ""
    # Which of them: "ema" (EMA), "raw", or "" = the averages where there are any.
    config.init_kind = ""

    config.model = model = ml_collections.ConfigDict()
    # One of cotnet_jax.list_models().
    model.name = "cotnet50"
    # Dropout before the classifier.
    model.drop_rate = 0.25
    # Drop path of the last block; earlier blocks rise to it linearly from 0.
    model.drop_path_rate = 0.1
    # 8, 16 or 32: input pixels to one pixel of the last stage.
    model.output_stride = 32
    # Activations: "float32", "bfloat16", or "auto" = bfloat16 on accelerators, float32 on CPUs.
    model.dtype = "auto"
    # True: batch statistics over all devices; False: per device, as published.
    model.sync_batch_norm = False
    # True: training normalises by the running statistics and does not change them, for fine-tuning
    # (config.init_from); scales and biases are trained.
    model.freeze_batch_norm = False

    config.data = data = ml_collections.ConfigDict()
    # A TFDS dataset's name, "digits", the path of a prepared folder, or "synthetic": images of
    # noise, as many and of as many classes as ImageNet's.
    data.name = "imagenet2012"
    # True: images of noise in place of the dataset's, with its classes, splits and sizes, to try
    # a configuration and measure its speed without decoding; imagenet2012 need not be there.
    data.fake = False
    # Where TFDS keeps its datasets; "" is TFDS's own default.
    data.data_dir = ""
    data.train_split = "train"
    data.eval_split = "validation"
    # Side of the square images given to the network, training and evaluation, in pixels.
    data.image_size = 224
    # Evaluation crops the centre image_size of an image whose short side is image_size / crop.
    data.crop = 0.875
    # Resizing filter: "bicubic" or "bilinear", both antialiased.
    data.interpolation = "bicubic"
    # Per-channel mean and standard deviation of the input, on the 0..1 scale.
    data.mean = (0.485, 0.456, 0.406)
    data.std = (0.229, 0.224, 0.225)
    # Decoding threads in each process, and decoding processes (0: threads alone, -1: one a core).
    # Beyond 4 threads processes are faster: Python lets one thread at a time between two images.
    # Evaluation has as many of its own, which wait between two evaluations.
    data.num_threads = 16
    data.num_workers = 0
    # Batches made ahead of the device.
    data.prefetch = 2
    # A run stops when more than this share of its images cannot be decoded.
    data.max_undecodable = 0.001

    config.augment = augment = ml_collections.ConfigDict()
    # Random resized crop: share of the area, and width / height.
    augment.scale = (0.08, 1.0)
    augment.ratio = (3 / 4, 4 / 3)
    # Probability of a horizontal flip.
    augment.flip = 0.5
    # RandAugment: m magnitude, mstd its standard deviation, n operations; "" is off.
    augment.randaugment = "rand-m15-mstd0.5-n2"
    # Brightness, contrast and saturation factors 1 - x .. 1 + x, only where RandAugment is off.
    augment.color_jitter = 0.4
    # Random erasing: probability (0 is off in the recipe), "pixel" (noise) or "const" (mean
    # colour), share of the area, and height / width.
    augment.erasing_probability = 0.0
    augment.erasing_mode = "pixel"
    augment.erasing_area = (0.02, 1 / 3)
    augment.erasing_ratio = (0.3, 10 / 3)

    config.mixing = mixing = ml_collections.ConfigDict()
    # Probability that a batch is mixed at all, and that a mixed batch is CutMix.
    mixing.probability = 1.0
    mixing.cutmix_probability = 0.5
    # Beta(alpha, alpha) of the mixing share; 0 turns that kind off.
    mixing.mixup_alpha = 0.8
    mixing.cutmix_alpha = 1.0
    # Share of the target spread evenly over all classes.
    mixing.label_smoothing = 0.1

    config.optimizer = optimizer = ml_collections.ConfigDict()
    # SGD, Nesterov momentum; weight decay is added to the gradient of kernels alone.
    optimizer.momentum = 0.9
    optimizer.weight_decay = 4e-5
    # Largest global gradient norm; 0 is off.
    optimizer.clip_norm = 0.0

    config.schedule = schedule = ml_collections.ConfigDict()
    # Constant inside an epoch: linear warm-up, then half a cosine over all epochs.
    schedule.peak = 0.25
    schedule.warmup_epochs = 5
    schedule.warmup_start = 1e-4
    schedule.final = 1e-5
    # Above 0, the three rates are for batches of so many images, and are multiplied by
    # config.batch_size / base_batch_size.
    schedule.base_batch_size = 0

    config.ema = ema = ml_collections.ConfigDict()
    # EMA of parameters and batch statistics, after every step; 0 is off.
    ema.decay = 0.9999
    # True: the decay rises to that from 0.1, as (1 + n) / (10 + n) after n steps.
    ema.warmup = False

    config.eval = evaluation = ml_collections.ConfigDict()
    # Images a step, summed over all devices.
    evaluation.batch_size = 640
    # Epochs between evaluations; the last epoch is always evaluated. Not read with steps_per_eval.
    evaluation.every_epochs = 1
    # A file of ReaL labels (Beyer et al., arXiv 2006.07159, real.json as published) of ImageNet's
    # validation images: the accuracy by them is told beside the ordinary one. "" is off.
    evaluation.real_labels = ""

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    # Steps between checkpoints, besides those of every evaluation and, without steps_per_eval, of
    # every epoch; 0 is none.
    checkpoint.every_steps = 0
    # Checkpoints kept for their EMA top-1, besides the latest.
    checkpoint.keep_best = 10

    config.profile = profile = ml_collections.ConfigDict()
    # Steps to profile, and the first of them, counted from 1 over the run; 0 steps is off. The
    # profile lies in WORKDIR/tensorboard/plugins/profile, for TensorBoard or xprof.
    profile.steps = 0
    profile.first_step = 11

    config.distributed = distributed = ml_collections.ConfigDict()
    # In a run of several processes, seconds without a sign of another one, or for one step, until
    # a process ends with exit code 69.
    distributed.timeout_seconds = 300
    # The same until all have started, for the first step and the first batch of an evaluation,
    # which are compiled, and for writing a checkpoint.
    distributed.slow_timeout_seconds = 1800

    # Steps between two lines of progress.
    config.log_every_steps = 50
    # Set by --config.notes to tell runs apart; not read by the program.
    config.notes = config_dict.placeholder(str)
    return config
