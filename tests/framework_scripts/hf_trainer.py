"""Hugging Face Trainer; between the marks is what the README shows. Argument: "train" or "resume"."""

import sys

from by_hand import Record
from hugging_face import config, data, loss_of
from transformers import TrainerCallback

resume = sys.argv[1] == "resume" and "run/checkpoint-4"

# README: begin
from transformers import GPT2LMHeadModel, TrainingArguments

from fusedfog.transformers import Trainer

args = TrainingArguments(
    "run",
    max_steps=8,
    save_steps=4,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    weight_decay=0.01,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_grad_norm=0.5,
)
model = GPT2LMHeadModel(config)
trainer = Trainer(model, args, train_dataset=data, decentralized={"topology": "one_peer_exponential"})
# README: end


class Recorded(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.record = Record(model, trainer.optimizer.optimizer)


recorded = Recorded()
trainer.add_callback(recorded)
# README: begin
trainer.train(resume_from_checkpoint=resume)
evaluated = trainer.evaluate(data)["eval_loss"]  # of the average over all ranks
trainer.save_model("averaged")
# README: end
recorded.record.save(data, evaluated, loss_of=loss_of)
