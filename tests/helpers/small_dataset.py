"""A prepared dataset of a few small images, written directly."""

import io

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from configs import default
from cotnet_jax.data.prepare.shards import image_features

NAME = "mine"


def png(seed, side=8):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def shard(folder, index, count, split="train"):
    return folder / f"{NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


def config_for(folder):
    """A configuration that trains and evaluates on the split 'train' of such a dataset."""
    config = default.get_config()
    config.data.name = str(folder)
    config.data.train_split = config.data.eval_split = "train"
    config.data.image_size = 8
    config.data.num_workers, config.data.num_threads = 0, 2
    config.batch_size = config.eval.batch_size = 4
    return config


def write(folder, labels, images=None, class_names=("cat", "dog"), shards=2):
    """Write a split 'train' with these labels, in equal shards, and return the folder."""
    folder.mkdir(parents=True)
    features = image_features(class_names, jpeg=False)
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    length = len(labels) // shards
    for index in range(shards):
        writer = ArrayRecordWriter(str(shard(folder, index, shards)), "group_size:1")
        for number in range(index * length, (index + 1) * length):
            example = {
                "image": images[number] if images else png(number),
                "label": labels[number],
                "file_name": f"{number}.png",
            }
            writer.write(serializer.get_tf_example(example).SerializeToString())
        writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=NAME, split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[length] * shards, num_bytes=0, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        version="1.0.0",
        split_infos=[split],
        check_data=False,
    )
    return folder
