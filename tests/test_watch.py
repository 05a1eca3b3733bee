"""Custom pipelines whose loops would be shared wrongly: each gets an error that says what is wrong, and no picture."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

import sage
from sage import Leaf, SharingPlan
from sage.families import RULES
from sage.rows import Rows
from sage.watch import FirstStep

B, STEPS = 5, 4
GROUPS = [[0, 2, 4], [1, 3]]


class Denoiser(ModelMixin, ConfigMixin):
    """A few matrix products; every argument matters and all but the latents are optional."""

    @register_to_config
    def __init__(self, channels: int = 4):
        super().__init__()
        self.mix = torch.nn.Linear(channels, 4)
        self.read = torch.nn.Linear(6, 4)

    def forward(self, sample, timestep, encoder_hidden_states=None, mood=None, map=None, hints=None, kv_cache=None):
        out = self.mix(sample.movedim(1, -1)).movedim(-1, 1).tanh()
        for condition in (encoder_hidden_states, mood, *(hints or [])):
            if condition is not None:
                out = out + self.read(condition.mean(1))[:, :, None, None]
        if map is not None:
            out = out + map
        return out + torch.as_tensor(timestep).view(-1, 1, 1, 1) / 1000


class Custom(DiffusionPipeline):
    """One loop; what happens in it is `style`, a subclass's or a test's `denoise(self, x, t, embeds) -> model output`."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, embeds, noise, after=lambda pipe, x: x):
        self.scheduler.set_timesteps(STEPS)
        x = noise
        for t in self.scheduler.timesteps:
            x = after(self, self.scheduler.step(self.style(x, t, embeds), t, x).prev_sample)
        return x

    def style(self, x, t, embeds):
        return guide(self.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([-embeds, embeds])))


def guide(output):
    uncond, cond = output.chunk(2)
    return uncond + 2.0 * (cond - uncond)


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    return Custom(Denoiser(), DDIMScheduler(prediction_type="v_prediction", clip_sample=False))


def embeds(count=B):
    return torch.randn(count, 3, 6, generator=torch.Generator().manual_seed(1))


def noise(count=B):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def plan(groups=GROUPS, share=0.5, count=B):
    leaves = [Leaf(f"picture {i}") for i in range(count)]
    return SharingPlan.flat(leaves, groups, share, representatives=[group[0] for group in groups])


def run(pipe, style=None, the_plan=None, rules=None, count=B, after=lambda pipe, x: x):
    if style is not None:
        pipe.style = style.__get__(pipe)
    with sage.enable(pipe, the_plan or plan(), rules=rules) as sharing:
        return pipe(embeds(count), noise(count), after), sharing


def test_the_loop_itself_is_shared(pipe):
    """The control: without a fault the same pipeline is shared, and the trunk is what it should be."""
    got, sharing = run(pipe)
    assert sharing.stats["rows"] == [2, 2, 5, 5]
    trunk = pipe(embeds()[GROUPS[1]].mean(0, keepdim=True), noise()[1:2])
    never_parts, _ = run(pipe, the_plan=plan(share=1.0))
    assert (never_parts[3:4] - trunk).abs().max() < 1e-5
    assert (got[3:4] - trunk).abs().max() > 1e-2


def interleaved(self, x, t, embeds):
    both = torch.stack([-embeds, embeds], 1).flatten(0, 1)
    uncond, cond = self.unet(x.repeat_interleave(2, 0), t, encoder_hidden_states=both).unflatten(0, (-1, 2)).unbind(1)
    return uncond + 2.0 * (cond - uncond)


def reversed_order(self, x, t, embeds):
    return self.unet(x.flip(0), t, encoder_hidden_states=embeds.flip(0)).flip(0)


def neighbours_output(self, x, t, embeds):
    return self.unet(x, t, encoder_hidden_states=embeds).roll(1, 0)


def own_guidance_scale(self, x, t, embeds):
    uncond, cond = self.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([-embeds, embeds])).chunk(2)
    return uncond + torch.arange(1.0, len(x) + 1).view(-1, 1, 1, 1) * (cond - uncond)


def own_timesteps(self, x, t, embeds):
    return self.unet(x, t - torch.arange(len(x)), encoder_hidden_states=embeds)


def unknown_argument(self, x, t, embeds):
    return self.unet(x, t, mood=embeds)


def unknown_list(self, x, t, embeds):
    return self.unet(x, t, hints=[embeds, embeds])


def conditions_by_token(self, x, t, embeds):
    return self.unet(x, t, encoder_hidden_states=embeds.transpose(0, 1))


def conditions_per_frame(self, x, t, embeds):
    return self.unet(x, t, encoder_hidden_states=embeds.repeat_interleave(2, 0))


def carried_state(self, x, t, embeds):
    return self.unet(x, t, encoder_hidden_states=embeds, kv_cache={"keys": embeds})


def part_of_the_batch(self, x, t, embeds):
    return torch.cat([self.unet(x[:3], t, encoder_hidden_states=embeds[:3]), x[3:]])


def no_step_between(self, x, t, embeds):
    return [self.unet(x, t, encoder_hidden_states=embeds) for _ in range(20)][-1]


FAULTS = [
    (interleaved, r"row 1 holds picture 0 where sage expects picture 1"),
    (reversed_order, r"row 0 holds picture 4 where sage expects picture 0"),
    (neighbours_output, r"what the loop makes of the denoiser's output \(guidance, for example\) differs between pictures"),
    (own_guidance_scale, r"differs between pictures 2 and 0.*rules=\{'model_output': \"representative\"\}"),
    (own_timesteps, r"the argument 'timestep' of unet differs between pictures 2 and 0"),
    (unknown_argument, r"argument 'mood' has 5 rows, one per latent, and no rule.*pass rules=\{'mood': \"mean\"\}"),
    (unknown_list, r"argument 'hints' has 5 rows, one per latent, and no rule"),
    (conditions_by_token, r"'encoder_hidden_states' must have 5 rows, one per latent.*got shape \(3, 5, 6\)"),
    (conditions_per_frame, r"'encoder_hidden_states' must have 5 rows, one per latent.*got shape \(10, 3, 6\)"),
    (carried_state, r"argument 'kv_cache' carries state from call to call"),
    (part_of_the_batch, r"unet was called with 3 rows, which is no multiple of the plan's 5 pictures"),
]


@pytest.mark.parametrize("style, message", FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_loop_that_would_be_shared_wrongly_is_refused(pipe, style, message):
    cls = type(pipe)
    with pytest.raises(ValueError, match=message):
        run(pipe, style)
    assert type(pipe) is cls and "_compiled_call_impl" not in pipe.unet.__dict__


def test_pictures_run_one_by_one_are_refused(pipe):
    """Two pictures, each called with its two guidance copies: as many rows as one call of both would have."""

    def one_by_one(self, x, t, embeds):
        return torch.cat([Custom.style(self, x[i : i + 1], t, embeds[i : i + 1]) for i in range(len(x))])

    with pytest.raises(ValueError, match="holds picture 0 where sage expects picture 1"):
        run(pipe, one_by_one, plan([[0, 1]], count=2), count=2)


def test_equal_noise_hides_the_order_until_groups_have_parted():
    """While all pictures are alike nothing can be told, and the next step is looked at too."""
    watch = FirstStep(Rows(((0, 1), (2,)), np.array([0, 2]), 3), RULES)
    alike = noise(1).expand(3, -1, -1, -1)
    watch.saw("unet", alike.flip(0))
    assert not watch.check(alike, alike)
    later = torch.cat([noise(1), noise(1), noise(2)[1:]])
    watch.saw("unet", later)
    assert watch.check(later, later)
    watch.saw("unet", later.flip(0))
    with pytest.raises(ValueError, match="row 0 holds picture 2 where sage expects picture 0"):
        watch.check(later, later)


def test_an_image_may_stand_before_the_latents(pipe):
    pipe.unet = Denoiser(channels=5)

    def image_first(self, x, t, embeds):
        return self.unet(torch.cat([torch.ones_like(x[:, :1]), x], 1), t, encoder_hidden_states=embeds)

    assert run(pipe, image_first)[1].stats["rows"] == [2, 2, 5, 5]
    with pytest.raises(ValueError, match="row 0 holds picture 4 where sage expects picture 0"):
        run(pipe, lambda self, x, t, embeds: image_first(self, x.flip(0), t, embeds.flip(0)).flip(0))


def test_masks_must_be_the_same_to_the_bit(pipe):
    """A few pixels are little of a mask's norm, and another region of the picture all the same."""
    pipe.unet = Denoiser(channels=5)

    def with_mask(self, x, t, embeds):
        masks = torch.ones(len(x), 1, 8, 8)
        masks[2, 0, 0, 0] = 0
        return self.unet(torch.cat([x, masks], 1), t, encoder_hidden_states=embeds)

    with pytest.raises(ValueError, match="what unet gets beside the latents .*differs between pictures 2 and 0"):
        run(pipe, with_mask)


def test_a_map_of_its_own_for_every_picture_is_refused(pipe):
    """Concatenated to the latents: a group would run under one member's."""
    pipe.unet = Denoiser(channels=5)

    def with_map(self, x, t, embeds, same=False):
        maps = torch.linspace(0, 1, len(x)).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        return self.unet(torch.cat([x, maps[:1].expand_as(maps) if same else maps], 1), t, encoder_hidden_states=embeds)

    with pytest.raises(ValueError, match=r"what unet gets beside the latents .*differs between pictures 2 and 0"):
        run(pipe, with_map)
    run(pipe, lambda self, x, t, embeds: with_map(self, x, t, embeds, same=True))


def test_two_steps_for_one_denoiser_call_are_refused(pipe):
    def step_again(pipe, x):
        return pipe.scheduler.step(x, pipe.scheduler.timesteps[-1], x).prev_sample

    with pytest.raises(RuntimeError, match="step was called 2 times, but Custom called no denoiser"):
        run(pipe, after=step_again)


def test_a_loop_that_never_steps_is_refused(pipe):
    with pytest.raises(RuntimeError, match="without calling pipe.scheduler.step"):
        run(pipe, no_step_between)


def test_a_rule_lets_the_users_own_argument_through(pipe):
    """The line that the error shows: the argument is then averaged over the group."""
    got, sharing = run(pipe, unknown_argument, plan(share=1.0), rules={"mood": "mean"})
    pipe.style = unknown_argument.__get__(pipe)
    trunk = pipe(embeds()[GROUPS[1]].mean(0, keepdim=True), noise()[1:2])
    assert (got[3:4] - trunk).abs().max() < 1e-5


def test_differing_arguments_can_be_accepted(pipe):
    """Then all of a group have the representative's."""
    whole = plan(share=1.0)
    for style, name in ((own_guidance_scale, "model_output"), (own_timesteps, "timestep")):
        got, _ = run(pipe, style, whole, rules={name: "representative"})
        assert all(torch.equal(got[member], got[group[0]]) for group in GROUPS for member in group)
        assert (got[0] - got[1]).abs().max() > 1e-2


def test_nothing_is_refused_where_nothing_is_shared(pipe):
    """Every fault that is one only under sharing runs, and gives what it gives without sage."""
    nothing = SharingPlan.independent(plan().leaves)
    for style in (interleaved, reversed_order, neighbours_output, own_guidance_scale, own_timesteps, unknown_argument):
        pipe.style = style.__get__(pipe)
        expected = pipe(embeds(), noise())
        assert torch.allclose(run(pipe, style, nothing)[0], expected, atol=1e-5), inspect.getsource(style)
