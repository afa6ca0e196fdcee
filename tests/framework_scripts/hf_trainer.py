"""Hugging Face Trainer; between the marks is what the README shows. Argument: "train" or "resume"."""

import sys
from pathlib import Path

from by_hand import Record
from hugging_face import config, data, loss_of

resume = sys.argv[1] == "resume" and "run/checkpoint-4"

# README: begin
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import fusedfog

args = TrainingArguments(  # joins torchrun's world
    "run",
    max_steps=8,
    save_steps=4,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_grad_norm=0.5,
    ddp_broadcast_buffers=False,  # what DDP would still send, and so would all ranks wait for each other
    ddp_find_unused_parameters=False,
    average_tokens_across_devices=False,
)
model = GPT2LMHeadModel(config).to(args.device)
optimizer = fusedfog.AdamW(model.parameters(), lr=args.learning_rate, model=model)


class Decentralized(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        fusedfog.local_gradients(trainer.model_wrapped)  # or DDP would average gradients
        if (saved := Path(args.output_dir, f"checkpoint-{state.global_step}", "ranks")).exists():
            fusedfog.load_checkpoint(saved, model, optimizer)

    def on_save(self, args, state, control, **kwargs):  # the Trainer saves rank 0 alone
        fusedfog.save_checkpoint(f"{args.output_dir}/checkpoint-{state.global_step}/ranks", model, optimizer)


trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[Decentralized()])
# README: end
record = Record(model, optimizer)
trainer.train(resume_from_checkpoint=resume)
with optimizer.averaged(model):
    evaluated = trainer.evaluate(data)["eval_loss"]
    trainer.save_model("averaged")
record.save(data, evaluated, loss_of=loss_of)
