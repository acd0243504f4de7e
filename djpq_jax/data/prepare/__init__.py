"""Turns archives and folders of images into sets that `djpq_jax.data` reads.

    folder.prepare('photos', 'sets')  # see also imagenet and cifar10

This is what `djpq data` calls. Nothing here needs TensorFlow.
"""
