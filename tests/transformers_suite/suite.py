"""transformers' common suite on our models; run by tests/test_transformers_suite.py, with `hf_suite` on the path."""

import unittest
from typing import ClassVar

import torch
from hf_suite import test_fsdp_mixin, test_tensor_parallel_mixin
from hf_suite.generation.test_utils import GenerationTesterMixin
from hf_suite.test_configuration_common import ConfigTester
from hf_suite.test_fsdp_mixin import FSDPTesterMixin
from hf_suite.test_modeling_common import ModelTesterMixin
from hf_suite.test_tensor_parallel_mixin import TensorParallelTesterMixin
from hf_suite.test_training_mixin import TrainingTesterMixin
from transformers.models.auto import modeling_auto

from pi_attention import models
from pi_attention.models import PiConfig, PiForCausalLM, PiForMaskedLM, PiModel

# The suite finds labels, and which classes are base models, by these names.
modeling_auto.MODEL_MAPPING_NAMES["pi"] = "PiModel"
for kind in ("CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
    words = "".join("_" + letter if letter.isupper() else letter for letter in kind.replace("LM", "Lm")).upper()
    getattr(modeling_auto, f"MODEL_FOR{words}_MAPPING_NAMES")["pi"] = f"PiFor{kind}"
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class CausalModels:
    base_model_class, causal_lm_class = PiModel, PiForCausalLM
    all_model_classes = (
        PiModel,
        PiForCausalLM,
        models.PiForSequenceClassification,
        models.PiForTokenClassification,
        models.PiForQuestionAnswering,
    )
    batch_size, seq_length, is_training = 5, 31, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    pattern: ClassVar = {"window": 4, "period": 5, "skips": 3, "gate": True}

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return PiConfig(**SIZES, **self.pattern)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class Common(ModelTesterMixin):
    made_by = CausalModels

    @property
    def model_tester(self):
        return self._tester

    @model_tester.setter
    def model_tester(self, value):
        self._tester = value

    @property
    def all_model_classes(self):
        return self.made_by.all_model_classes

    def setUp(self):
        self.model_tester = self.made_by(self)
        self.config_tester = ConfigTester(self, config_class=PiConfig, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()


class CausalModelsTest(
    Common, GenerationTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin, unittest.TestCase
):
    pass


class BidirectionalModels(CausalModels):
    all_model_classes = (PiModel, PiForMaskedLM)
    pattern: ClassVar = CausalModels.pattern | {"causal": False}


class BidirectionalModelsTest(Common, unittest.TestCase):
    made_by = BidirectionalModels


class MixedModels(CausalModels):
    pattern: ClassVar = {
        "window": 4,
        "period": [3, 5, 6, 7],
        "skips": 3,
        "sinks": 2,
        "fusion": "mass",
        "qk_norm": True,
        "layer_patterns": ["pi", "dense"],
    }


class MixedPatternsTest(Common, GenerationTesterMixin, unittest.TestCase):
    """A period a head, sinks and a dense layer."""

    test_attention_outputs = None  # with sinks a cached map has a column for each empty sink slot, too

    made_by = MixedModels


del Common, ModelTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin
