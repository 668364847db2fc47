"""Classification: the model against timm's parts, accuracy against a plain loop, weights, resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import REPOSITORY
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from imagenet import draw_picture, make_imagenet
from oracle import authors_checkpoint
from PIL import Image
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.config import load_config
from contnet.data.augmentation import build_classification_transform
from contnet.engine.classification_evaluation import ClassificationEvaluator
from contnet.engine.optimizer import build_lr_scheduler, build_optimizer
from contnet.errors import UserError
from contnet.launch.main import main
