"""The ImageNet recipe of the published CoTNet models, every field explained.

Not run by itself: each of the other files here starts from it and changes what differs.
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
    # Above 0: length of the run in steps, in place of epochs.
    config.steps = 0
    # Steps between evaluations, each with a checkpoint; 0: every config.eval.every_epochs epochs.
    config.steps_per_eval = 0
    # Images per step, over all devices and all accumulated parts.
    config.batch_size = 640
    # Number of parts that a step's batch is processed in, one after the other.
    config.accumulate_steps = 1
    # Weights to start from: a converted folder, a workdir (its best checkpoint) or one step of it
    # (WORKDIR/checkpoints/STEP), a file of PyTorch or kecam, or hf-hub:OWNER/NAME; "": random
    # weights.
    config.init_from = ""
    # Kind of those weights: "ema", "raw", or "" = the EMA where there is one.
    config.init_kind = ""
    # True: use weights whose classes have other names than the dataset's, in the order they have.
    config.accept_classes = False

    config.model = model = ml_collections.ConfigDict()
    # One of cotnet_jax.list_models().
    model.name = "cotnet50"
    # Dropout before the classifier.
    model.drop_rate = 0.25
    # Drop path rate of the last block; those of earlier blocks rise to it linearly from 0.
    model.drop_path_rate = 0.1
    # Stride of the last stage: 8, 16 or 32 input pixels per pixel.
    model.output_stride = 32
    # Activations: "float32", "bfloat16", or "auto" = bfloat16 on accelerators, float32 on CPUs.
    model.dtype = "auto"
    # True: batch statistics over all devices; False: per device, as published.
    model.sync_batch_norm = False
    # True: training normalises by the running statistics and does not change them, for fine-tuning
    # (config.init_from); scales and biases are still trained.
    model.freeze_batch_norm = False

    # Fine-tuning of config.init_from. A parameter's name is its path, such as
    # "stage1_block0/cot/key_conv/kernel"; WORKDIR/parameters.txt lists them. A pattern is a regular
    # expression for a whole name, or for the whole name of a module that the parameter is in:
    # "stem|stage[12].*" are the stem and two stages, "stage3_block1" is one block. Each alternative
    # must fit something.
    config.finetune = finetune = ml_collections.ConfigDict()
    # True: a new classifier with random weights, even where the classes are as many as before.
    finetune.new_head = False
    # Pattern of the parameters that stay as they are, without gradients and optimizer state. A
    # batch norm without trained parameters keeps and uses its running statistics. "": none.
    finetune.freeze = ""
    # Factors of the learning rate: "head=10,stem.*=0.1", or "{'head': 10}". The first pattern that
    # fits a name counts; the others have 1.
    finetune.rate_multipliers = ""
    # Factor of the learning rate from each layer to the one before it: 1 for the head, this for the
    # last block, its square for the block before, ..., the least for the stem. 1 is off.
    finetune.layer_decay = 1.0
    # Epochs at the beginning in which only the head is trained, as if all else were frozen; the
    # schedule runs through both phases. Unused where head_only_steps, the same in steps, is not 0.
    finetune.head_only_epochs = 0
    finetune.head_only_steps = 0

    config.data = data = ml_collections.ConfigDict()
    # A TFDS dataset's name, "digits", the path of a prepared folder, or "synthetic": images of
    # noise, with ImageNet's number of images and classes.
    data.name = "imagenet2012"
    # True: images of noise in place of the dataset's, with its classes, splits and sizes, to try
    # a configuration or measure its speed without decoding; imagenet2012 need not be there.
    data.fake = False
    # Where TFDS keeps its datasets; "" is TFDS's own default.
    data.data_dir = ""
    data.train_split = "train"
    data.eval_split = "validation"
    # Side of the square images that the network gets, in training and evaluation, in pixels.
    data.image_size = 224
    # Evaluation crops the centre image_size of an image whose short side is image_size / crop.
    data.crop = 0.875
    # Resizing filter: "bicubic" or "bilinear", both antialiased.
    data.interpolation = "bicubic"
    # Per-channel mean and standard deviation of the input, on the 0..1 scale.
    data.mean = (0.485, 0.456, 0.406)
    data.std = (0.229, 0.224, 0.225)
    # True: training decodes a JPEG at 1/2, 1/4 or 1/8 of its size where the crop is at least 2, 4,
    # or 8 times as large as image_size: large photos in a fraction of the time, with pixels that
    # are a little different. Evaluation decodes in full.
    data.scaled_decoding = False
    # True: every class comes equally often in an epoch, however many images it has; the epoch is as
    # long as without. Labels are read once, at the start.
    data.balanced_sampling = False
    # Decoding processes (0: the main process alone) and threads of each. -1 and 0 choose: on more
    # than 4 cores a process for each, since between images only one thread of a process can run
    # Python; on fewer cores threads. Evaluation has as many of its own, which wait between two
    # evaluations.
    data.num_workers = -1
    data.num_threads = 0
    # Batches prepared ahead of the device.
    data.prefetch = 2
    # A run stops when more than this fraction of its images cannot be decoded.
    data.max_undecodable = 0.001
    # Pixels of the largest image that is decoded (537 MB as RGB); a larger one, by its header,
    # counts as undecodable. This default is the most that Pillow opens.
    data.max_pixels = 178_956_970
    # True: images are turned upright as their EXIF orientation says. None: those of a prepared
    # folder (data.name is a path) are, and no others: ImageNet's published accuracy was measured
    # without.
    data.exif_orientation = config_dict.placeholder(bool)

    config.augment = augment = ml_collections.ConfigDict()
    # Random resized crop: fraction of the area, and width / height.
    augment.scale = (0.08, 1.0)
    augment.ratio = (3 / 4, 4 / 3)
    # Probability of a horizontal flip.
    augment.flip = 0.5
    # RandAugment: m magnitude, mstd its standard deviation, n operations; "" is off.
    augment.randaugment = "rand-m15-mstd0.5-n2"
    # Where it is computed: "host", or "device", which spares the host a fifth of its work per image
    # and draws other random numbers.
    augment.randaugment_on = "host"
    # Brightness, contrast and saturation factors 1 - x .. 1 + x, only where RandAugment is off.
    augment.color_jitter = 0.4
    # Random erasing: probability (0, off, in the recipe), "pixel" (noise) or "const" (mean
    # colour), fraction of the area, and height / width.
    augment.erasing_probability = 0.0
    augment.erasing_mode = "pixel"
    augment.erasing_area = (0.02, 1 / 3)
    augment.erasing_ratio = (0.3, 10 / 3)

    config.mixing = mixing = ml_collections.ConfigDict()
    # Probability that a batch is mixed at all, and that a mixed batch is CutMix.
    mixing.probability = 1.0
    mixing.cutmix_probability = 0.5
    # The mixing lambda is drawn from Beta(alpha, alpha); 0 turns that kind off.
    mixing.mixup_alpha = 0.8
    mixing.cutmix_alpha = 1.0
    # Fraction of the target spread evenly over all classes.
    mixing.label_smoothing = 0.1

    config.loss = loss = ml_collections.ConfigDict()
    # "balanced": the cross entropy of a class is weighted by images / (classes * images of the
    # class) of the training split. "": all alike.
    loss.class_weights = ""

    config.optimizer = optimizer = ml_collections.ConfigDict()
    # "sgd" with Nesterov momentum, or "adamw". Weight decay is for kernels only: SGD adds it to
    # their gradients, AdamW to their updates.
    optimizer.name = "sgd"
    optimizer.weight_decay = 4e-5
    # Of SGD.
    optimizer.momentum = 0.9
    # Of AdamW: decay of both moments' averages, and what is added to the root of the second.
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.999
    optimizer.epsilon = 1e-8
    # Largest global gradient norm; 0 is off.
    optimizer.clip_norm = 0.0

    config.schedule = schedule = ml_collections.ConfigDict()
    # Linear warm-up, then half a cosine over the whole run.
    schedule.peak = 0.25
    # The rate is constant within an "epoch", as published, or within a "step".
    schedule.unit = "epoch"
    # Unused where warmup_steps, for the unit "step", is not 0.
    schedule.warmup_epochs = 5
    schedule.warmup_steps = 0
    schedule.warmup_start = 1e-4
    schedule.final = 1e-5
    # Above 0: the three rates are for batches of this many images, and are multiplied by
    # config.batch_size / base_batch_size.
    schedule.base_batch_size = 0

    config.ema = ema = ml_collections.ConfigDict()
    # EMA (exponential moving average) of parameters and batch statistics, after every step; 0 is
    # off.
    ema.decay = 0.9999
    # True: the decay rises to that value from 0.1, as (1 + n) / (10 + n) after n steps.
    ema.warmup = False

    config.eval = evaluation = ml_collections.ConfigDict()
    # Images per step, over all devices.
    evaluation.batch_size = 640
    # Epochs between evaluations; the last epoch is always evaluated. Unused with steps_per_eval.
    evaluation.every_epochs = 1
    # A file of ReaL labels of ImageNet's validation images (Beyer et al., arXiv 2006.07159,
    # real.json as published), to report the accuracy by them as well. "" is off.
    evaluation.real_labels = ""
    # Bins of equal width that the expected calibration error (ECE) of a report counts confidences
    # in; 15 in Guo et al., arXiv 1706.04599.
    evaluation.calibration_bins = 15

    config.early_stopping = early_stopping = ml_collections.ConfigDict()
    # The run ends when this metric of an evaluation, such as "ema_top1" or "raw_loss", has not
    # become better in so many successive evaluations. "" is off.
    early_stopping.metric = ""
    early_stopping.patience = 10

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    # Steps between checkpoints, in addition to those of every evaluation and, without
    # steps_per_eval, of every epoch; 0 adds none.
    checkpoint.every_steps = 0
    # Checkpoints kept for their EMA top-1, in addition to the latest two.
    checkpoint.keep_best = 10

    config.resume = resume = ml_collections.ConfigDict()
    # A run that resumes is refused where a field differs that the run's meaning depends on, such
    # as batch_size or schedule.peak. These may differ all the same: fields or sections, such as
    # "epochs,schedule", or "all".
    resume.allow_changes = ""

    config.profile = profile = ml_collections.ConfigDict()
    # Number of steps to profile (0 is off), and the first of them, counted from 1 over the run. The
    # profile is written to WORKDIR/tensorboard/plugins/profile, for TensorBoard or xprof.
    profile.steps = 0
    profile.first_step = 11

    config.distributed = distributed = ml_collections.ConfigDict()
    # In a run of several processes, a process ends with exit code 69 when it hears nothing from
    # another one, or a step takes longer, for this many seconds.
    distributed.timeout_seconds = 300
    # The same while processes start, for the first step and the first batch of an evaluation,
    # which are compiled, and while a checkpoint is written.
    distributed.slow_timeout_seconds = 1800

    config.log = log = ml_collections.ConfigDict()
    # Where metrics go besides metrics.jsonl and TensorBoard: "wandb", "trackio" or "wandb,trackio",
    # which must be installed.
    log.writers = ""
    # Their project.
    log.project = "cotnet_jax"
    # What is logged besides, names such as "step_time,memory" or "all": step_time (seconds), mfu
    # (model FLOPs utilization, 0..1, of the peak in bfloat16, where the device's is known), memory
    # (GiB at its peak, where the device tells), gradient_norms (one for each stage), images (16
    # augmented training images, for TensorBoard, at the start and after each evaluation).
    log.extras = ""

    # Steps between two lines of progress.
    config.log_every_steps = 50
    # Free text to tell runs apart; not read by the program.
    config.notes = config_dict.placeholder(str)
    return config
