"""One training on two machines: torchrun, Accelerate, DeepSpeed, LLaMA-Factory, and the cable.

    make train-two-machines                                          # all launchers, in turn
    make train-two-machines ARGS="--launchers torchrun --steps 2"    # one of them
    make train-two-machines ARGS="--launchers torchrun --cut 2"      # the cable is cut after step 2
    make train-two-machines ARGS="--launchers torchrun --kill 2"     # machine 1 is killed instead

The two machines are two network namespaces of this one, with a virtual cable between them whose
bytes are counted (lab/cable.py). Each training runs twice: two processes on machine 0, then one
process a machine. For two machines the same command is typed on both; only the rank differs.

Look at: the commands; the losses, which in float32 are those of one machine; the bytes that a step
puts on the cable beside the arithmetic; with --cut or --kill how soon machine 0 notices, in which
parts, and that no process stays.
"""

import argparse
import os
import shlex
import signal
import sys

import alpha_beta
import machines
from machines_picture import Curve, draw

from lab import ROOT, cable, fail, models, results, shown, training
from lab.profile import load_profile
from lab.table import table

PORT = 29500  # machine 0's own: nothing else can have taken it
MOVED = "TWO_MACHINES_MODEL"  # variable: the model's folder, for the same script on machine 0
TRAININGS = {  # by launcher: the configurations
    "torchrun": ["ddp"],
    "accelerate": ["ddp", "fsdp"],
    "deepspeed": ["z2", "z3"],
    "llamafactory": ["lora"],
}
# What a step sends of all the numbers that are trained.
COLLECTIVES = {
    "ddp": ["all_reduce"],
    "fsdp": ["all_gather", "all_gather", "reduce_scatter"],
    "z2": ["all_reduce", "all_gather"],  # as DeepSpeed 0.19.8 does it: costs.md, section 4
    "z3": ["all_gather", "reduce_scatter"],  # stage3_max_reuse_distance: gathered once
    "lora": ["all_reduce"],
}
GLOO = alpha_beta.TRIPS | {"reduce_scatter": 2}  # its reduce-scatter sends what an all-reduce does
ROUNDING = 1e-6  # relative: scripts print losses with six digits behind the point
ALLOWANCE_S = 30  # for a launcher to see that its process has ended, and to end


def typed(launcher: str, config: str, nodes: int, rank: int) -> tuple[dict, list]:
    """Variables and parts of the command on machine `rank` of `nodes`: two processes in all."""
    each = 2 // nodes  # processes of a machine
    meeting = cable.ADDRESSES[0]  # machine 0, where all processes meet
    if launcher == "torchrun":
        parts = ["torchrun", "--nnodes", nodes, "--node-rank", rank, "--nproc-per-node", each]
        parts += ["--master-addr", meeting, "--master-port", PORT]
        return {}, [*parts, "modules/04_Accelerate/01_train_ddp.py"]
    if launcher == "accelerate":
        parts = ["accelerate", "launch"]
        parts += ["--config_file", f"modules/04_Accelerate/configs/{config}.yaml"]
        parts += ["--num_machines", nodes, "--machine_rank", rank, "--num_processes", 2]  # in all
        parts += ["--main_process_ip", meeting, "--main_process_port", PORT]
        return {}, [*parts, "modules/04_Accelerate/02_train_accelerate.py"]
    if launcher == "deepspeed":
        hosts = machines.hostfile(cable.ADDRESSES[:nodes], each)
        parts = ["deepspeed", "--hostfile", hosts, "--no_ssh", "--node_rank", rank]
        parts += ["--master_addr", meeting, "--master_port", PORT]
        parts += ["modules/05_DeepSpeed/train.py"]
        return {}, [*parts, "--deepspeed", f"modules/05_DeepSpeed/configs/{config}.json"]
    variables = {"FORCE_TORCHRUN": 1, "NNODES": nodes, "NODE_RANK": rank, "NPROC_PER_NODE": each}
    variables |= {"MASTER_ADDR": meeting, "MASTER_PORT": PORT}
    return variables, ["llamafactory-cli", "train"]


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    which = "who starts the training (default: all, in turn)"
    parser.add_argument(
        "--launchers", nargs="+", choices=TRAININGS, default=list(TRAININGS), help=which
    )
    # A machine that vanishes
    cut = "take the cable down after this step"
    parser.add_argument("--cut", type=int, metavar="STEP", help=cut)
    kill = "kill every process of machine 1 after this step"
    parser.add_argument("--kill", type=int, metavar="STEP", help=kill)
    patience = "with --cut or --kill: seconds that a process waits for the others (default: 20)"
    parser.add_argument("--timeout", type=int, default=20, metavar="SECONDS", help=patience)
    # The training
    training.add_data_flags(parser, profile.train)
    training.add_step_flags(parser, profile.train, saves=False)
    args = parser.parse_args()
    check(args, profile)
    if MOVED not in os.environ:
        way = cable.way_to_machine_0()
        # Here, where there is a network to fetch it from.
        os.environ[MOVED] = shown(models.model_folder(args.model).resolve())
        os.execvp(way[0], [*way, sys.executable, *sys.orig_argv[1:]])
    os.chdir(ROOT)  # all paths below are seen from there
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # so that `finally` runs
    configs = [(launcher, config) for launcher in args.launchers for config in TRAININGS[launcher]]
    if args.cut or args.kill:
        raise SystemExit(vanish(configs, args, profile))

    # -----------------------------------------------------------------------------
    # 1. Every training on one machine, then on two

    metrics = {"world_size": 2}
    losses = []
    sizes = []
    curves = []
    good = True
    for launcher, config in configs:
        one = trained(launcher, config, 1, args, profile)
        two = trained(launcher, config, 2, args, profile)
        pairs = list(zip(one.losses(), two.losses(), strict=True))
        differs = max(abs(loss - other) / other for other, loss in pairs)
        left = one.left + two.left
        good = good and differs < ROUNDING and not left
        name = f"{launcher}, {config}"
        ends = [f"{two.losses()[step]:.6f}" for step in (0, -1)]
        losses.append([name, *ends, f"{differs:.1g}", left])

        # -------------------------------------------------------------------------
        # 2. What a step put on the cable, beside the arithmetic

        sent, returned, packets = two.per_step()
        numbers = machines.trained_numbers(two.name, os.environ[MOVED])
        by_gloo = payload(config, numbers, GLOO)
        by_nccl = payload(config, numbers, alpha_beta.TRIPS)
        headers = packets * cable.HEADERS
        columns = (sent, returned, by_gloo, headers, sent - by_gloo - headers, by_nccl)
        sizes.append([name, *(f"{size:,.0f}" for size in columns)])
        curves.append(Curve(name, one.losses(), two.losses(), sent, by_gloo, by_nccl))
        key = f"{launcher}_{config}"
        metrics[f"{key}_losses"] = [round(loss, 6) for loss in two.losses()]
        metrics[f"{key}_difference_ratio"] = float(f"{differs:.2g}")
        metrics[f"{key}_sent_bytes"] = round(sent)
        metrics[f"{key}_returned_bytes"] = round(returned)
        metrics[f"{key}_gloo_bytes"] = round(by_gloo)
        metrics[f"{key}_nccl_bytes"] = round(by_nccl)
        metrics[f"{key}_left_count"] = left
    print()
    columns = ["on two machines", "loss of step 1", f"of step {args.steps}"]
    table([*columns, "differs from one machine's by", "processes left"], losses)
    print()
    columns = ["bytes a step", "node0 to node1", "back", "arithmetic", "headers", "rest", "by NCCL"]
    table(columns, sizes)
    results.picture(__file__, "two_machines", draw(curves))
    results.finish(__file__, metrics, vars(args))
    raise SystemExit(0 if good else 1)


# -----------------------------------------------------------------------------
# One training


def trained(launcher: str, config: str, nodes: int, args, profile, fault=None):
    """The training, ended: its commands are printed before, and what ended it is in its logs."""
    name = f"{launcher}-{config}-{nodes}"
    given = argparse.Namespace(**(vars(args) | {"model": os.environ[MOVED]}))
    given.timeout = args.timeout if fault else 600  # seconds, the scripts' own default
    interface = cable.CABLE if nodes == 2 else "lo"
    flags = [*training.flags_of(given), "--timeout", str(given.timeout)]
    if launcher == "llamafactory":
        flags = [machines.written_for_llamafactory(name, given, profile)]
    commands = []
    print(f"== {launcher}, {config}, {nodes} machine{'s' * (nodes > 1)}")
    for rank in range(nodes):  # the same on each, but for its rank
        variables, parts = typed(launcher, config, nodes, rank)
        variables["GLOO_SOCKET_IFNAME"] = interface
        line = [f"{key}={value}" for key, value in variables.items()]
        line += map(str, [*parts, *flags])
        print(f"{cable.NODES[rank]}: {shlex.join(line)}", flush=True)
        commands.append(line)
    run = machines.Training(name)
    run.run(commands, args.timeout + ALLOWANCE_S, fault)
    run.refuse_failed()
    return run


def payload(config: str, numbers: int, trips: dict[str, int]) -> float:
    """Bytes that each of two processes sends in a step, `numbers` of 4 bytes being trained."""
    around = sum(trips[collective] for collective in COLLECTIVES[config])
    return around * (2 - 1) / 2 * numbers * 4


# -----------------------------------------------------------------------------
# A machine that vanishes


def vanish(configs, args, profile) -> int:
    """Each training, and its second machine lost in the middle; the exit code of this script."""
    kind = "cut" if args.cut else "kill"
    fault = machines.Fault(args.cut or args.kill, cable.cut if args.cut else machines.kill)
    metrics = {"timeout_s": args.timeout}
    good = True
    for launcher, config in configs:
        run = trained(launcher, config, 2, args, profile, fault)
        cable.mend()
        if not run.fault_s:
            fail(f"{run.name} ended before step {fault.step}: {run.ending(0)}")
        for rank in (0, 1) if args.cut else (0,):
            print(f"  {run.ending(rank)}")
            ended_s = run.ended_s[rank] - run.fault_s
            good = good and bool(run.codes()[rank]) and rank not in run.killed
            metrics[f"{launcher}_{config}_node{rank}_end_s"] = round(ended_s, 1)
            metrics[f"{launcher}_{config}_node{rank}_exit_code"] = run.codes()[rank]
        print(f"  processes left on both: {run.left}", flush=True)
        good = good and not run.left
        metrics[f"{launcher}_{config}_left_count"] = run.left
    results.finish(__file__, metrics, vars(args), kind)
    return 0 if good else 1


def check(args, profile) -> None:
    """Exit code 2 where this cannot be done here."""
    steps = [step for step in (args.cut, args.kill) if step is not None]
    if len(steps) > 1 or any(not 1 <= step < args.steps for step in steps):
        fail("give --cut or --kill, not both, and a step from 1 to the last but one of --steps")
    if args.timeout < 1:
        fail("--timeout must be at least 1 second")
    if args.steps < 2 or args.accumulate != 1:
        fail("--steps must be at least 2, --accumulate 1: the bytes are those of one micro-step")
    if profile.device != "cpu":
        way = "make train-two-machines PROFILE=cpu, in the CPU environment (LOCK=cpu)"
        fail(f"this script computes on the CPU: {way}")
    training.refuse_impossible(args, profile.device)
    cable.refuse_running()


if __name__ == "__main__":
    main()
