"""Changes of lora_ref made by hand, each of a kind that LoRA libraries had as a bug: `old`, once in the file, becomes `new`.

`shows` is what a user sees. `python tests/mutation/run.py --suite --handmade` tries the suite on each.
"""

# ruff: noqa: E501 - a changed line is quoted whole

from __future__ import annotations

from typing import NamedTuple

CORE, INIT, API, FILES = (f"lora_ref/{room}/" for room in ("core", "init", "api", "files"))
LAYER, TYPES, MODEL, NAMES = (CORE + name for name in ("layer.py", "layer_types.py", "model.py", "names.py"))
MODULES, INITS, SCALING, UPDATE = (CORE + n for n in ("adapter_modules.py", "inits.py", "scaling.py", "update.py"))
DECOMPOSED, CORDA, LORA_GA, EVA = (INIT + n for n in ("decompositions.py", "corda.py", "lora_ga.py", "eva.py"))
TENSORS, CONVERSION, FOLDER, CONFIG = (
    FILES + n for n in ("adapter_tensors.py", "conversion.py", "adapter_folder.py", "config_file.py")
)


class Change(NamedTuple):
    file: str
    old: str
    new: str
    shows: str


HANDMADE = (
    # layers: forward
    Change(
        LAYER,
        "total = total + self.branch(x, name)\n",
        "total = (total + self.branch(x, name)).to(y.dtype)\n",
        "two adapters in bfloat16 are rounded one after the other",
    ),
    Change(
        LAYER,
        "if name not in self.merged_adapters:\n",
        "if not self.merged_adapters:\n",
        "with one of two adapters merged the other one no longer acts",
    ),
    Change(
        LAYER,
        "z = self.scaling[name] * lora_B(lora_A(dropped))",
        "z = self.scaling[name] * lora_B(lora_A(x))",
        "lora_dropout does nothing",
    ),
    Change(
        LAYER,
        "return z if initial is None else z - initial(x)",
        "return z if initial is None else z - initial(dropped)",
        "dropout drops the initial update of PiSSA, too",
    ),
    Change(
        LAYER,
        "y[rows] = self.add_branches(y[rows], x[rows], [name])",
        "y[rows] = self.add_branches(y[rows], x[rows], self.active_adapters)",
        "in a mixed batch every sample gets the active adapter",
    ),
    Change(
        LAYER,
        "nn.Dropout(config.lora_dropout).train(self.training)",
        "nn.Dropout(config.lora_dropout)",
        "an adapter that is added in evaluation mode drops inputs there",
    ),
    Change(
        LAYER,
        'if config.lora_dropout and self.kind != "embedding":',
        'if config.lora_dropout and self.kind == "linear":',
        "convolutions have no dropout",
    ),
    Change(
        LAYER,
        "A, B = (x.to(x.device if x.is_meta else W.device, W.dtype if rounded else dtype).to(dtype) for x in (A, B))",
        "A, B = (x.to(x.device if x.is_meta else W.device, dtype) for x in (A, B))",
        "factors of a half precision weight are not rounded to it",
    ),
    Change(
        LAYER,
        "return torch.float32 if autocast_adapter_dtype and base.itemsize < 4 else base",
        "return base",
        "factors of half precision weights are half precision",
    ),
    Change(
        LAYER,
        "return torch.float32 if autocast_adapter_dtype and base.itemsize < 4 else base",
        "return torch.float32",
        "factors of a float64 weight are float32",
    ),
    # layers: training, scaling
    Change(LAYER, "            if not self.train_B[name]:\n", "            if False:\n", "MiCA's B trains"),
    Change(
        LAYER,
        "self._rescale({name: factor * self.initial_scaling[name]})",
        "self._rescale({name: factor * self.scaling[name]})",
        "set_scale twice multiplies",
    ),
    Change(
        LAYER,
        "self._rescale({name: factor * self.initial_scaling[name]})",
        "self._rescale({name: factor})",
        "set_scale(1) makes s = 1",
    ),
    Change(
        SCALING,
        "return lora_alpha / (math.sqrt(r) if use_rslora else r)",
        "return lora_alpha / (math.sqrt(r) if use_rslora else r) if lora_alpha > 0 else 0.0",
        "a negative lora_alpha does nothing",
    ),
    Change(
        SCALING,
        "return lora_alpha / (math.sqrt(r) if use_rslora else r)",
        "return lora_alpha / (int(math.sqrt(r)) if use_rslora else r)",
        "rsLoRA is right for square ranks only",
    ),
    Change(
        UPDATE,
        "return scaling * (B @ A)  # (out, r)",
        "return abs(scaling) * (B @ A)  # (out, r)",
        "a negative scaling is merged as a positive one",
    ),
    Change(
        UPDATE,
        "B = B.swapaxes(0, 1).swapaxes(1, 2)  # (E, out, r) -> (out, r, E)",
        "B = B.swapaxes(0, 1)  # (E, out, r) -> (out, E, r)",
        "experts get each other's columns of B",
    ),
    # layers: merging
    Change(
        LAYER,
        "        total = at_least_float32(W)\n",
        "        total = W\n",
        "a half precision sum is rounded after each adapter",
    ),
    Change(
        LAYER,
        "return D if initial is None else D - self.stored(initial.matrix())",
        "return D",
        "merging PiSSA adds its initial update once more",
    ),
    Change(
        LAYER,
        "return self.set_aside[0] if self.set_aside and not self.disable_adapters else self.base_weight",
        "return self.base_weight",
        "what is added to a merged model starts from the merged weight",
    ),
    Change(
        LAYER,
        "if enabled is self.disable_adapters and self.set_aside:",
        "if not enabled and self.set_aside and not self.disable_adapters:",
        "switching a merged adapter on again loses the merge",
    ),
    Change(
        LAYER,
        "            self.install_weight(then, [now], self.merged_adapters)\n",
        "            self.install_weight(then, [], [])\n",
        "switching off forgets what was merged",
    ),
    # layer types
    Change(
        TYPES,
        ' * getattr(base, "embed_scale", 1.0)',
        "",
        "an embedding that scales its output (Gemma) does not scale the branch",
    ),
    Change(
        TYPES,
        "base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)  # (*tokens, r)",
        "None, scale_grad_by_freq=base.scale_grad_by_freq)  # (*tokens, r)",
        "A of the padding token gets a gradient",
    ),
    Change(
        TYPES,
        "base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)  # (*tokens, r)",
        "base.padding_idx)  # (*tokens, r)",
        "scale_grad_by_freq does not hold for A",
    ),
    Change(
        TYPES,
        '("stride", "padding", "dilation", "padding_mode")',
        '("stride", "padding", "padding_mode")',
        "the branch of a dilated convolution is not dilated",
    ),
    Change(
        TYPES,
        '("stride", "padding", "dilation", "padding_mode")',
        '("stride", "padding", "dilation")',
        "the branch of a convolution pads with zeros",
    ),
    Change(
        TYPES,
        '("stride", "padding", "dilation", "padding_mode")',
        '("padding", "dilation", "padding_mode")',
        "a convolution with a stride cannot run",
    ),
    Change(
        TYPES,
        'lora_B = cls(r, base.out_channels, ones, groups=base.groups, bias=False, device="meta")',
        'lora_B = cls(r, base.out_channels, ones, bias=False, device="meta")',
        "convolutions with groups cannot run",
    ),
    Change(
        TYPES,
        "names = [name for name in self.active_adapters if name not in self.merged_adapters]\n",
        "names = list(self.active_adapters)\n",
        "a merged adapter of a raw parameter acts twice",
    ),
    Change(
        TYPES,
        "vars(self).update(fan_in_fan_out=is_conv1d_of_transformers(base_layer))",
        "vars(self).update(fan_in_fan_out=False)",
        "a Conv1D is taken for a Linear",
    ),
    # modules
    Change(
        MODULES,
        "        for parameter in self.frozen:\n            parameter.requires_grad = True\n",
        "",
        "after disable_adapter everything stays frozen",
    ),
    Change(
        MODULES,
        "frozen = [] if enabled else [p for _, p in self.adapter_parameters() if p.requires_grad]",
        "frozen = []",
        "factors train while the adapter is off",
    ),
    Change(
        MODULES,
        "self.active_adapters = [other for other in self.active_adapters if other != name]",
        "self.active_adapters = []",
        "deleting one of two active adapters switches the other off",
    ),
    Change(
        MODULES,
        "parameter.requires_grad = name in self.active_adapters and not inference_mode",
        "parameter.requires_grad = not inference_mode",
        "adapters that are not active train",
    ),
    Change(
        MODULES,
        "copy.deepcopy(self.original_module).requires_grad_(False)",
        "copy.copy(self.original_module).requires_grad_(False)",
        "training a saved module changes the original",
    ),
    Change(
        MODULES,
        "if self.disable_adapters or not self.active_adapters:\n",
        "if not self.active_adapters:\n",
        "switched off, the trained copy of a saved module still computes",
    ),
    Change(
        MODULES,
        "if bare is not None and id(bare) not in seen:\n",
        "if bare is not None:\n",
        "a module that is used twice is adapted twice",
    ),
    # model
    Change(
        MODEL,
        "                wrapper.register_forward_pre_hook(_leave_the_fast_path)\n",
        "                pass\n",
        "in evaluation a TransformerEncoderLayer ignores the adapters",
    ),
    Change(
        MODEL,
        "        if was_off:  # then the new wrappers are, too\n",
        "        if False:\n",
        "an adapter that is added while all are off acts",
    ),
    Change(
        MODEL,
        "bias.requires_grad_(name in names and not inference_mode)",
        "bias.requires_grad_(True)",
        "the biases of another adapter train",
    ),
    Change(
        MODEL,
        "if before and not self.active_adapters and self.peft_config:",
        "if False:",
        "deleting the active adapter leaves none active",
    ),
    Change(
        MODEL,
        "[n for n in self.active_adapters if n != adapter_name]",
        "[]",
        "deleting one of two active adapters makes the first active alone",
    ),
    Change(
        MODEL,
        "            if isinstance(parent, nn.MultiheadAttention):\n",
        "            if False:\n",
        "an adapter on out_proj is accepted, and never acts",
    ),
    Change(
        MODEL,
        '        self._check_not_merged([adapter_name], "deleting")\n',
        "",
        "deleting a merged adapter leaves its update",
    ),
    Change(
        MODEL,
        '        self._check_not_merged([adapter_name], "scaling")\n',
        "",
        "set_scale of a merged adapter is accepted, and does nothing",
    ),
    Change(
        MODEL,
        '        self._check_not_merged(list(self.peft_config), "mixing adapters in a batch")\n',
        "",
        "a mixed batch of a merged model gets the merged adapter, too",
    ),
    Change(MODEL, '(mode == "all" or module in adapted)', "True", "bias='lora_only' trains every bias"),
    Change(
        MODEL,
        'further = mode == "all" and (own.endswith("_bias") or own.startswith("bias_"))',
        "further = False",
        "the biases of a GRU do not train",
    ),
    Change(MODEL, "if added and layer.groups > 1:\n", "if False:\n", "a convolution with groups is merged wrongly"),
    # names
    Change(
        NAMES,
        'template = "{}" if isinstance(value, str) else r"(.*\\.)?({})"',
        'template = "{}" if isinstance(value, str) else r".*({})"',
        "the key 'proj' of rank_pattern matches 'q_proj'",
    ),
    Change(NAMES, "pattern.fullmatch(name)", "pattern.match(name)", "a pattern need not match the end of the name"),
    Change(NAMES, "if saved and not saved_parent:", "if saved:", "a module inside of a saved one is saved, too"),
    Change(
        NAMES,
        "        if excluded is not None:\n",
        "        if excluded is not None and target.match(name) is None:\n",
        "exclude_modules does nothing",
    ),
    Change(NAMES, "r, rule = config.rank_pattern[key], ", "r, rule = config.r, ", "rank_pattern does nothing"),
    Change(
        NAMES,
        'out = exclude.match(name) or exclude.match(name.rpartition(".")[0])',
        "out = None",
        "exclude_modules does not hold for target_parameters",
    ),
    # starts
    Change(
        INITS,
        "A = draw_uniform((*batch, r, n_in), 1 / math.sqrt(n_in), weight, rng)",
        "A = draw_uniform((*batch, r, n_in), 1 / math.sqrt(r), weight, rng)",
        "A starts with the bound of another dimension",
    ),
    Change(
        INITS,
        "A = draw_normal((*batch, r, n_in), 1 / r, weight, rng)",
        "A = draw_normal((*batch, r, n_in), 1 / math.sqrt(r), weight, rng)",
        "'gaussian' has the standard deviation 1 / sqrt(r)",
    ),
    Change(
        "lora_ref/numerics/leading.py",
        "    for _ in range(niter):\n",
        "    for _ in range(niter - 1):\n",
        "pissa_niter_n makes n - 1 iterations",
    ),
    Change(
        DECOMPOSED,
        "U, S, Vh = numerics.randomized_svd(weight, r, niter, rng)",
        "U, S, Vh = numerics.randomized_svd(weight, r, 0, rng)",
        "pissa_niter_n ignores n",
    ),
    Change(
        DECOMPOSED,
        "return factors_with_residual(weight, root[:, None] * Vh, U * root, scaling)",
        "return factors_with_residual(weight, root[:, None] * Vh, U * root * scaling, scaling)",
        "PiSSA is right for s = 1 only",
    ),
    Change(
        DECOMPOSED,
        "B = numerics.cast(U[:, -r:], weight)",
        "B = numerics.cast(U[:, :r], weight)",
        "MiCA takes the major directions",
    ),
    Change(
        DECOMPOSED,
        "A[:, :r] = R  # equal but for rounding",
        "A[:, :r] = abs(R)  # equal but for rounding",
        "OLoRA's A has positive numbers only",
    ),
    Change(
        DECOMPOSED,
        "for _ in range(iterations):",
        "for _ in range(1):",
        "LoftQ makes one iteration, whatever is asked for",
    ),
    Change(CORDA, "U = numerics.svd(R.T)[0][:, -r:]", "U = numerics.svd(R.T)[0][:, :r]", "CorDA's 'kpm' is 'ipm'"),
    Change(
        LORA_GA,
        "c = weight.shape[0] ** 0.25 / stable_gamma**0.5",
        "c = weight.shape[1] ** 0.25 / stable_gamma**0.5",
        "LoRA-GA scales by the inputs, and not by the outputs",
    ),
    Change(LORA_GA, '    if direction == "A2rBr":\n', "    if False:\n", "LoRA-GA's direction 'A2rBr' is 'ArB2r'"),
    Change(
        EVA,
        "A = A / singular_values[:r, None] ** 0.5",
        "A = A / singular_values[:r, None]",
        "EVA whitens twice as much",
    ),
    Change(EVA, "[: round(r * rho)]", "[:r]", "EVA's rho does nothing"),
    # combinations, contexts
    Change(
        API + "combination.py",
        "return Factors(_cat([s * A for s, A in zip(scales, As, strict=True)], -2), _cat(Bs, -1))",
        "return Factors(_cat([s * A for s, A in zip(scales, As, strict=True)], -2), _cat([s * B for s, B in zip(scales, Bs, strict=True)], -1))",
        "'cat' weighs twice",
    ),
    Change(
        API + "combination.py",
        "return [math.copysign(root, s) for root, s in zip(roots, scales, strict=True)], roots",
        "return roots, roots",
        "'linear' ignores the sign of a weight",
    ),
    Change(
        API + "weighted.py",
        "ws, scalings = [w for _, w in parents], [layer.scaling[name] for name, _ in parents]",
        "ws, scalings = [w for _, w in parents], [layer.initial_scaling[name] for name, _ in parents]",
        "a combination ignores set_scale",
    ),
    Change(
        API + "weighted.py",
        "pairs = [plain_factors(layer, name, layer.scaling[name]) for name, _ in parents]",
        "pairs = [layer.factors(name) for name, _ in parents]",
        "a combination of PiSSA adapters adds their initial updates",
    ),
    Change(
        API + "layers.py",
        "{n: s / scale for n, s in self.scaling.items()}",
        "{n: s * scale for n, s in self.scaling.items()}",
        "unscale_layer multiplies instead of dividing",
    ),
    Change(
        API + "helpers.py",
        "name: scaling.get(name, s) for name, s in layer.scaling.items()",
        "name: s for name, s in layer.scaling.items()",
        "the scaling stays after its context",
    ),
    Change(
        API + "model.py",
        "parameter.requires_grad_(requires_grad)\n            for bias in [",
        "parameter.requires_grad_(False)\n            for bias in [",
        "after the context disable_adapter nothing trains",
    ),
    # files
    Change(
        CONVERSION,
        "factor = math.sqrt(2) if config.use_rslora else 2",
        "factor = 2",
        "a converted PiSSA adapter with rsLoRA has another s",
    ),
    Change(
        CONVERSION,
        "torch.cat([B, -(initial.scaling / s) * initial.B.to(B)], dim=1)",
        "torch.cat([B, -initial.B.to(B)], dim=1)",
        "a PiSSA adapter is converted wrongly after set_scale",
    ),
    Change(
        CONVERSION,
        "rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()}",
        "rank_pattern=config.rank_pattern",
        "a converted adapter with rank_pattern does not load",
    ),
    Change(
        CONFIG,
        "    data = dict(sorted(data.items()))\n",
        "    data = {k: dict(sorted(v.items())) if isinstance(v, dict) else v for k, v in sorted(data.items())}\n",
        "saving sorts patterns, of which the first match counts",
    ),
    Change(
        FOLDER,
        "init = None if again or skip_other_shapes else lambda name: allocate_nothing",
        "init = None",
        "loading draws numbers, and changes what comes after",
    ),
    Change(
        FOLDER,
        "config.inference_mode = not is_trainable\n",
        "config.inference_mode = True\n",
        "a configuration that was loaded to train says it does not",
    ),
    Change(
        TENSORS,
        'problems += [f"{key}: is not expected" for key in tensors if key not in expected and key not in optional]',
        "problems += []",
        "tensors that fit nowhere are ignored when a file is loaded",
    ),
    Change(
        TENSORS,
        "parameter.data = tensor\n",
        "parameter.data = tensor.contiguous().to(torch.float32).to(tensor.dtype)\n",
        "float64 factors lose half of their digits when they are loaded",
    ),
)
