"""One training on two machines: torchrun, Accelerate, DeepSpeed, LLaMA-Factory, and the cable.

    make train-two-machines                                          # all launchers, in turn
    make train-two-machines ARGS="--launchers torchrun --steps 2"    # one of them
    make train-two-machines ARGS="--launchers torchrun --cut 2"      # the cable is cut after step 2
    make train-two-machines ARGS="--launchers torchrun --kill 2"     # machine 1 loses its power

The two machines are two network namespaces of this one, with a virtual cable between them whose
bytes are counted (lab/cable.py). Each launcher trains twice: two processes on machine 0, then a
process a machine. On two machines the same command is typed on both, only its rank differs.

Look at: the commands; the losses, which in float32 are those of one machine to the last digit; the
bytes that a step puts on the cable beside the arithmetic; with --cut and --kill, how long machine 0
takes to notice, and that it says so, ends with an error and leaves no process.
"""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

import alpha_beta
import machines
import psutil

from lab import ROOT, cable, fail, models, results, training
from lab.profile import load_profile
from lab.table import table

PORT = 29500  # machine 0's own: nothing else can have taken it
MOVED = "TWO_MACHINES_MODEL"  # variable: the model's folder, for the same script on machine 0
TRAININGS = {
    "torchrun": ["ddp"],
    "accelerate": ["ddp", "fsdp"],
    "deepspeed": ["z2", "z3"],
    "llamafactory": ["lora"],
}
ALLOWANCE_S = 30  # beyond --timeout, for a launcher to notice its process's end, and to end


def command_of(launcher: str, config: str, nodes: int, rank: int) -> tuple[dict, list]:
    """Variables and words of what is typed on machine `rank` of `nodes`: two processes in all."""
    each = 2 // nodes  # processes of a machine
    meeting = cable.ADDRESSES[0]  # where all processes meet: machine 0
    modules = "modules/04_Accelerate"
    if launcher == "torchrun":
        words = ["torchrun", "--nnodes", nodes, "--node-rank", rank, "--nproc-per-node", each]
        words += ["--master-addr", meeting, "--master-port", PORT]
        return {}, [*words, f"{modules}/01_train_ddp.py"]
    if launcher == "accelerate":
        words = ["accelerate", "launch", "--config_file", f"{modules}/configs/{config}.yaml"]
        words += ["--num_machines", nodes, "--machine_rank", rank, "--num_processes", 2]  # in all
        words += ["--main_process_ip", meeting, "--main_process_port", PORT]
        return {}, [*words, f"{modules}/02_train_accelerate.py"]
    if launcher == "deepspeed":
        hosts = machines.hostfile(cable.ADDRESSES[:nodes], each)
        words = ["deepspeed", "--hostfile", hosts, "--no_ssh", "--node_rank", rank]
        words += ["--master_addr", meeting, "--master_port", PORT]
        words += ["modules/05_DeepSpeed/train.py"]
        return {}, [*words, "--deepspeed", f"modules/05_DeepSpeed/configs/{config}.json"]
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
    parser.add_argument("--cut", type=int, default=0, metavar="STEP", help=cut)
    kill = "kill all processes of machine 1 after this step"
    parser.add_argument("--kill", type=int, default=0, metavar="STEP", help=kill)
    # The training
    training.add_data_flags(parser, profile.train)
    training.add_step_flags(parser, profile.train, saves=False)
    parser.set_defaults(steps=4)
    args = parser.parse_args()
    check(args, profile)
    if MOVED not in os.environ:
        way = cable.way_to_machine_0()
        # Here, where there is a network to fetch it from.
        os.environ[MOVED] = str(models.model_folder(args.model))
        os.execvp(way[0], [*way, sys.executable, *sys.orig_argv[1:]])
    args.model = os.environ[MOVED]
    machines.settle()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # so that `finally` runs

    for launcher in args.launchers:
        for config in TRAININGS[launcher]:
            for nodes in (1, 2):
                t = trained(launcher, config, nodes, args, profile)
                print(t.codes(), t.result.get("losses") or machines.losses_of_llamafactory(t.name))
                print(t.left, [b.sent - a.sent for a, b in zip(t.at_steps, t.at_steps[1:])], [b.returned - a.returned for a, b in zip(t.at_steps, t.at_steps[1:])], [b.packets - a.packets for a, b in zip(t.at_steps, t.at_steps[1:])], flush=True)


def trained(launcher, config, nodes, args, profile, fault=None):
    """The training after its end, its commands printed before."""
    name = f"{launcher}-{config}-{nodes}"
    interface = cable.CABLE if nodes == 2 else "lo"
    commands = []
    for rank in range(nodes):
        variables, words = command_of(launcher, config, nodes, rank)
        variables["GLOO_SOCKET_IFNAME"] = interface
        if launcher == "llamafactory":
            words.append(machines.written_for_llamafactory(name, args, profile))
        else:
            words += training.flags_of(args)
        line = [f"{key}={value}" for key, value in variables.items()] + [str(w) for w in words]
        print(f"{cable.NODES[rank]}: {shlex.join(line)}", flush=True)
        commands.append(["env", *line])
    whole = machines.Training(name)
    whole.run(commands, ALLOWANCE_S, 0, None)
    whole.refuse_failed()
    return whole


def check(args, profile):
    cable.refuse_running()


if __name__ == "__main__":
    main()
