"""The trainer's configuration: one frozen model, one section for each part of a run (two of them in data_section.py
and teacher_section.py).

The defaults distil Qwen3-235B-A22B into Qwen3-8B. Relative paths are relative to the current directory. It knows
neither files, environment nor command line (see settings.py), and imports neither torch nor transformers. The text
under a field is its documentation: it goes into generated configuration files and the reference page.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from student_trainer.data_section import Data
from student_trainer.section import (
    Distribution,
    MaxSteps,
    PositiveInt,
    Probability,
    Rate,
    Section,
    Temperature,
    Weight,
)
from student_trainer.teacher_section import Teacher


class Models(Section):
    """Which models, and how they are loaded."""

    teacher_model: str = "Qwen/Qwen3-235B-A22B"
    """Folder or hub name of the teacher that the trainer starts itself; unused where teacher.endpoint is set."""
    student_model: str = "Qwen/Qwen3-8B"
    """Folder or hub name of the student that is trained."""
    load_in_4bit: bool = True
    """Quantise the teacher that the trainer starts itself to 4 bits (bitsandbytes). For the student there is
    student_load_in_4bit."""
    load_in_8bit: bool = False
    """Quantise it to 8 bits instead; switches load_in_4bit off where that is left out."""
    torch_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of the student, and of the teacher that the trainer starts itself."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel; auto takes FlashAttention where it is installed and the device can use it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the student's files. Only for sources that you trust."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of LoRA adapters, which are trained in place of the student's weights; 0 trains all weights."""
    lora_alpha: Rate = 32.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped while training."""
    lora_targets: list[str] = Field(default_factory=list)
    """Names of the linear layers that get adapters, such as q_proj; empty takes all but the LM head."""
    student_load_in_4bit: bool = False
    """QLoRA: keep the student's own weights in 4 bits (bitsandbytes) below its adapters; needs lora_rank."""
    student_load_in_8bit: bool = False
    """The same in 8 bits."""
    merge_adapters: bool = True
    """Write best and final models with the adapters merged into the weights, in torch_dtype, and keep the adapter in
    the folder adapter beside them; false writes the adapter alone. Checkpoints hold the adapter alone."""

    @model_validator(mode="before")
    @classmethod
    def _eight_bit_replaces_the_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and str(data.get("load_in_8bit")).lower() == "true" and "load_in_4bit" not in data:
            return {**data, "load_in_4bit": False}
        return data

    @model_validator(mode="after")
    def _one_quantisation(self) -> Models:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true; set one of them to false")
        if self.student_load_in_4bit and self.student_load_in_8bit:
            raise ValueError("student_load_in_4bit and student_load_in_8bit are both true; set one of them to false")
        if (self.student_load_in_4bit or self.student_load_in_8bit) and not self.lora_rank:
            raise ValueError("a quantised student is trained through adapters; set lora_rank, to 16 for example")
        return self


class Training(Section):
    """What both stages share."""

    output_dir: str = "outputs"
    """Folder for models, checkpoints, responses and metrics of a run."""
    seed: int = Field(default=42, ge=0)
    """Seed of everything random: the split, the order, the modes, the sampling."""
    use_wandb: bool = False
    """Report metrics to Weights & Biases (after `wandb login`)."""
    wandb_project: str = "qwen3-distillation"
    """Project that the run is reported to."""
    use_trackio: bool = False
    """Report metrics to trackio, by default in its folder on this machine."""
    trackio_project: str = "qwen3-distillation"
    """Project that the run is reported to."""
    use_tensorboard: bool = True
    """Write TensorBoard files below output_dir."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face hub (owner/name) that gets the last stage's final model, after `hf auth login`; it
    is made, private, where it is not there yet. null pushes nothing."""
    logging_steps: PositiveInt = 10
    """Optimiser steps between two lines of metrics."""
    save_steps: PositiveInt = 500
    """Optimiser steps between two checkpoints."""
    save_total_limit: PositiveInt | None = 3
    """Number of checkpoints that are kept; null keeps all."""
    warmup_ratio: Probability = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: Weight = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Weight = 1.0
    """Norm to which gradients are clipped; 0 does not clip."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = "cosine"
    """Course of the learning rate after the warm-up."""
    packing: Literal["auto", True, False] = "auto"
    """Put the sequences of a forward pass into one row without padding, each of them attending to itself alone. auto
    does so where the student's attention can (sdpa, FlashAttention) and else pads rows of similar length; true refuses
    to start where it cannot, false always pads."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    parallel: Literal["ddp", "fsdp", "deepspeed"] | None = None
    """How the processes of torchrun or accelerate launch share the training: ddp gives each the whole student, fsdp
    (FSDP2) and deepspeed (ZeRO-3) shard weights, gradients and optimiser states; null takes what accelerate launch is
    configured for, else ddp."""
    deepspeed_config: str | None = None
    """JSON file with DeepSpeed's own configuration where parallel is deepspeed; null takes plain ZeRO-3."""
    resume: bool | str = False
    """Continue from the newest checkpoint of each stage, or from the checkpoint folder named here."""
    log_file: str = "distillation.log"
    """File that gets everything the console shows, and more."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port at which a run serves its numbers to Prometheus (`GET /metrics`), without a key and without TLS; each run on
    a machine needs its own (`pip install 'strong2weak[metrics]'`). null serves none."""
    metrics_host: str = "127.0.0.1"
    """Address of the port for metrics; 0.0.0.0 lets other machines read them."""
    traces_endpoint: str | None = None
    """Where OpenTelemetry spans of steps and teacher calls go by OTLP over HTTP, such as
    http://localhost:4318/v1/traces (`pip install 'strong2weak[otel]'`); null traces nothing."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of transformers.TrainingArguments, by their own names."""


class NonPolicyDistillation(Section):
    """Stage 1, off-policy: train on the teacher's responses, alpha * soft(T) + beta * cross-entropy."""

    num_epochs: PositiveInt = 3
    """Passes over the responses."""
    batch_size: PositiveInt = 4
    """Sequences of one forward pass on one device."""
    gradient_accumulation_steps: PositiveInt = 8
    """Forward passes of one optimiser step."""
    learning_rate: Rate = 5e-5
    """Peak learning rate."""
    temperature: Temperature = 3.0
    """T of the soft loss, applied once on both sides."""
    alpha: Weight = 0.7
    """Weight of the soft loss against the teacher's distribution."""
    beta: Weight = 0.3
    """Weight of the cross-entropy on the response's tokens at temperature 1."""
    t_squared: bool = False
    """Multiply the soft loss by T squared (Hinton et al., 2015)."""
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Divergence of the soft loss."""
    jsd_beta: Probability = 0.5
    """b of the generalised JSD: 0 is the forward, 1 the reverse KL."""
    distribution: Distribution = "top_k"
    """What the teacher tells of each position: top_k alternatives and the tail, or full, its final hidden state, of
    which the trainer makes the exact distribution (2 bytes times the teacher's width a token, and its LM head once)."""
    top_k: PositiveInt = 64
    """Alternatives that the teacher gives at each position; the rest is one bucket, the tail. Unused where
    distribution is full."""
    modes: Literal["both", "thinking", "non_thinking", "mixed"] = "both"
    """Modes in which the teacher answers each prompt; mixed draws one by thinking_prob."""
    thinking_prob: Probability = 0.5
    """Probability of the thinking mode where modes is mixed."""
    samples_per_prompt: PositiveInt = 1
    """Responses for each prompt and mode."""
    max_prompts: PositiveInt | None = None
    """Ask for responses to the first training prompts only; null asks for all. Stage 2 uses all in any case."""
    max_new_tokens: PositiveInt = 1024
    """Largest number of tokens of a response."""
    response_temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.6
    """Temperature at which the teacher samples responses; 0 is greedy."""
    response_top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus from which the teacher samples responses."""
    dataset_path: str | None = None
    """Existing Parquet file of responses to use in place of asking the teacher for them."""
    allow_other_teacher: bool = False
    """Accept a dataset_path that another teacher wrote, as long as it has this teacher's tokenizer."""
    keep: Literal["all", "verified", "shortest_verified"] = "all"
    """Responses to train on (stage 2's share of responses too): all, those that the verifier finds right, or of these
    the shortest of each prompt and mode. The dataset keeps the others, with what was said in its column verified."""
    keep_per_prompt: PositiveInt | None = None
    """Largest number of kept responses of a prompt in one mode, the first samples or the shortest; null sets no limit,
    with shortest_verified it keeps one."""
    verifier: str | None = None
    """What finds a response right, in the words of evaluation.verifier; null takes that one."""
    max_steps: MaxSteps = -1
    """Stop after this many optimiser steps; -1 goes by num_epochs."""

    @model_validator(mode="after")
    def _some_loss(self) -> NonPolicyDistillation:
        if self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha and beta are both 0, nothing would be learnt; set one of them above 0")
        if self.alpha == 0 and self.distribution == "full":
            raise ValueError("alpha is 0, so the teacher's distribution is not used; set distribution to top_k")
        return self


class PolicyDistillation(Section):
    """Stage 2, on-policy: the student samples, the teacher scores those tokens, a divergence is minimised on them."""

    num_epochs: PositiveInt = 5
    """Passes over the prompts."""
    batch_size: PositiveInt = 4
    """Sequences of one forward pass on one device."""
    gradient_accumulation_steps: PositiveInt = 8
    """Forward passes of one optimiser step."""
    learning_rate: Rate = 1e-5
    """Peak learning rate, lower than in stage 1."""
    temperature: Temperature = 2.0
    """T of the loss, applied once on both sides."""
    thinking_prob: Probability = 0.5
    """Probability that a prompt is answered in the thinking mode."""
    on_policy_share: Probability = Field(default=1.0, alias="lambda")
    """Share of the examples that train on the student's own completion; the others train on a response of the teacher
    (stage 1's, or those of non_policy_distillation.dataset_path) with the same divergence (Agarwal et al., 2024)."""
    loss: Literal["reverse_kl", "forward_kl", "jsd", "policy_gradient"] = "reverse_kl"
    """Divergence that is minimised; policy_gradient uses the sampled token alone."""
    support: Literal["teacher", "student"] = "teacher"
    """Whose top_k the divergence runs over: the teacher's with the tail, or the student's own."""
    jsd_beta: Probability = 0.5
    """b of the generalised JSD: 0 is the forward, 1 the reverse KL."""
    distribution: Distribution = "top_k"
    """What the teacher tells of each position: top_k alternatives and the tail, or full, its final hidden state, of
    which the trainer makes the exact distribution (2 bytes times the teacher's width a token, and its LM head once)."""
    top_k: PositiveInt = 64
    """Alternatives at each position; the rest is one bucket, the tail. Unused where distribution is full."""
    t_squared: bool = False
    """Multiply the loss by T squared (Hinton et al., 2015)."""
    max_new_tokens: PositiveInt = 1024
    """Largest number of tokens that the student samples."""
    sampling_temperature: Temperature | None = None
    """Temperature at which the student samples; null takes the loss's temperature."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps between sampling a rollout and training on it: 0 is strictly on-policy. Above 0 the teacher
    scores while the student trains, and importance weights make up for what the student has learnt meanwhile."""
    rollout_engine: Literal["auto", "continuous", "padded", "vllm"] = "auto"
    """What the student samples with, in evaluation too: continuous refills a slot as soon as its completion ends,
    padded is transformers' generate in batches, auto is the first of these that the model's attention allows; vllm runs
    vLLM beside the student on each process's device (pip install 'strong2weak[vllm]')."""
    rollout_slots: PositiveInt = 32
    """Completions that are sampled at the same time on one device. Keys and values take rollout_slots times the longest
    prompt and completion (147 KB a token with Qwen3-8B in bfloat16); with vllm it is the largest number."""
    rollout_engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vllm.LLM, such as gpu_memory_utilization: 0.4 unless given, because the student needs the
    rest of the GPU. It sleeps while the student trains and holds neither weights nor a cache then."""
    max_steps: MaxSteps = -1
    """Stop after this many optimiser steps; -1 goes by num_epochs."""

    @model_validator(mode="after")
    def _responses_have_an_estimator(self) -> PolicyDistillation:
        if self.on_policy_share < 1 and (self.support == "student" or self.loss == "policy_gradient"):
            what = "support student" if self.support == "student" else "loss policy_gradient"
            raise ValueError(
                f"{what} is an estimate on tokens that the student sampled, lambda {self.on_policy_share:g} trains on "
                "the teacher's too; set lambda to 1, or loss and support to a divergence on the teacher's top_k"
            )
        return self

    @model_validator(mode="after")
    def _support_has_an_estimator(self) -> PolicyDistillation:
        if self.support == "student" and self.loss not in ("reverse_kl", "policy_gradient"):
            raise ValueError(f"support student has an unbiased estimator for reverse_kl alone, loss is {self.loss}")
        if self.distribution == "full" and (self.support == "student" or self.loss == "policy_gradient"):
            what = "support student" if self.support == "student" else "loss policy_gradient"
            raise ValueError(f"{what} estimates what distribution full knows exactly; set one of them to another value")
        return self

    @model_validator(mode="after")
    def _prefixes_of_one_temperature(self) -> PolicyDistillation:
        divergence = self.loss != "policy_gradient" and self.support == "teacher"
        if self.max_staleness and divergence and self.sampling_temperature not in (None, self.temperature):
            raise ValueError(
                f"max_staleness {self.max_staleness} weighs prefixes at the loss's temperature {self.temperature}, "
                f"sampling_temperature is {self.sampling_temperature}; leave it out, or set max_staleness to 0"
            )
        return self


class Evaluation(Section):
    """How models are measured on held-out problems."""

    verifier: str | None = None
    """What counts as right: final_answer compares the text after the think block with the record's output; contains,
    number, boxed, math, json and reasoning_gym are others (docs/data.md), and module:function names a function of
    (text, example). Options follow, as in number?tolerance=0.01. null measures no accuracy."""
    problems: PositiveInt = 512
    """Largest number of held-out problems for each mode."""
    max_new_tokens: PositiveInt = 1024
    """Largest number of tokens of an answer."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Temperature of the answers; 0 is greedy."""
    batch_size: PositiveInt = 64
    """Answers that the student writes at the same time."""
    show: Annotated[int, Field(ge=0)] = 2
    """Sample outputs that are shown for each mode."""
    every_epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs between two measurements; 0 measures only at the beginning and the end of each stage."""


STAGE_NAMES = {"non_policy": "stage 1, off-policy", "policy": "stage 2, on-policy"}
"""What people read for a stage."""


class Config(Section):
    """A whole run."""

    models: Models = Models()
    """Which models, and how they are loaded."""
    data: Data = Data()
    """Where examples come from."""
    training: Training = Training()
    """What both stages share."""
    non_policy_distillation: NonPolicyDistillation = NonPolicyDistillation()
    """Stage 1: off-policy, on the teacher's responses."""
    policy_distillation: PolicyDistillation = PolicyDistillation()
    """Stage 2: on-policy, on the student's own completions."""
    evaluation: Evaluation = Evaluation()
    """How models are measured."""
    teacher: Teacher = Teacher()
    """Where the teachers are, and how they are called."""

    def wants_full(self, stage: str) -> bool:
        """Whether a stage of `stage` (all, non_policy, policy or test) trains on the teacher's whole distribution."""
        off, on = self.non_policy_distillation, self.policy_distillation
        return (stage != "policy" and off.distribution == "full") or (
            stage != "non_policy" and on.distribution == "full"
        )
