# What set-up says depends on the machine: distribution, container, WSL2, an NVIDIA card and its driver. Sourced by setup.sh,
# and for its package index by quantise_packages.sh.
# MACHINE_ROOT stands before each path that is read here, so that tests can describe a machine.
at=${MACHINE_ROOT:-}
without_card="compute on the CPU: make setup LOCK=cpu"

wsl2() { [ -e "$at/dev/dxg" ]; }
in_container() { [ -e "$at/.dockerenv" ] || [ -e "$at/run/.containerenv" ] || [ -n "${KUBERNETES_SERVICE_HOST:-}" ]; }

# -----------------------------------------------------------------------------
# The distribution, and the command that installs something on it

# `ubuntu 24.04`, `debian 12`, `fedora 42` ...; a derivative goes by the family that it names in ID_LIKE.
distribution() {
  (
    ID="" ID_LIKE="" VERSION_ID=""
    [ ! -r "$at/etc/os-release" ] || . "$at/etc/os-release"
    for family in $ID $ID_LIKE; do
      case $family in
        ubuntu|debian|fedora|arch) echo "$family ${VERSION_ID:-}"; exit ;;
        rhel|centos) echo "rhel ${VERSION_ID:-}"; exit ;;
      esac
    done
    echo "unknown"
  )
}

# as_root COMMAND: how this user can run it.
as_root() {
  if [ "$(id -u)" = 0 ]; then echo "$1"
  elif command -v sudo >/dev/null; then echo "sudo $1"
  elif in_container; then echo "$1 as root (ask whoever built the image, or from the host: docker exec -u root)"
  else echo "$1 as root (ask the administrator)"
  fi
}

# install_command PACKAGE: by its Debian name.
install_command() {
  local package=$1
  case $(distribution) in
    ubuntu*|debian*) as_root "sh -c 'apt-get update && apt-get install -y $package'" ;;
    fedora*|rhel*) as_root "dnf install -y $(sed 's/^g++$/gcc-c++/; s/-dev$/-devel/' <<< "$package")" ;;
    arch*) as_root "pacman -S --needed $(sed 's/^g++$/gcc/; s/^python3$/python/' <<< "$package")" ;;
    *) echo "the package of your distribution that Debian calls $package" ;;
  esac
}

# Where a complete Python for the lock comes from when uv cannot fetch one.
python_command() {
  local lock=$1
  case "$(distribution) $lock" in
    "ubuntu 24.04 gpu") install_command python3.12-dev ;;
    ubuntu*) as_root "sh -c 'apt-get update && apt-get install -y software-properties-common && add-apt-repository -y ppa:deadsnakes/ppa && apt-get install -y python3.11-dev'" ;;
    "debian 12 "*|fedora*) install_command python3.11-dev ;;
    *) echo "Miniforge, whose Python 3.11 make setup then takes" ;;   # Debian 13 and Arch have no Python 3.11
  esac
}

# package_index PYTHON: the index that pip is told to use; nothing where it is PyPI. uv does not read pip's settings by itself.
package_index() {
  echo "${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$({ "$1" -m pip config get global.index-url || pip config get global.index-url; } 2>/dev/null || true)}}"
}

# -----------------------------------------------------------------------------
# The NVIDIA card and its driver

# In WSL2 the driver, and so nvidia-smi, is Windows's.
nvidia_smi() {
  if command -v nvidia-smi; then :
  elif [ -x "$at/usr/lib/wsl/lib/nvidia-smi" ]; then echo "$at/usr/lib/wsl/lib/nvidia-smi"
  else return 1
  fi
}

# Is an NVIDIA card here, whatever its driver does? No process is started: every make target asks this.
nvidia_card() {
  local vendor id class
  for vendor in "$at"/sys/bus/pci/devices/*/vendor; do
    [ -r "$vendor" ] && [ -r "${vendor%vendor}class" ] && read -r id < "$vendor" && [ "$id" = 0x10de ] || continue
    read -r class < "${vendor%vendor}class" && [[ $class = 0x03* ]] && return 0   # a display, not the card's sound
  done
  compgen -G "$at/dev/nvidia[0-9]*" >/dev/null || [ -e "$at/usr/lib/wsl/lib/nvidia-smi" ]
}

driver_command() {
  if wsl2; then echo "install the newest NVIDIA driver in Windows (none in WSL), then wsl --shutdown in PowerShell"; return; fi
  if in_container; then echo "update the driver on the host, which this container shares"; return; fi
  case $(distribution) in
    ubuntu*) echo "$(install_command nvidia-driver-580-open), then reboot" ;;
    debian*) echo "install nvidia-open from NVIDIA's own repository, since Debian's driver is older than 580 (docs.nvidia.com/datacenter/tesla/driver-installation-guide), then reboot" ;;
    fedora*) echo "$(as_root "dnf install -y akmod-nvidia xorg-x11-drv-nvidia-cuda") after enabling RPM Fusion nonfree (rpmfusion.org/Configuration), then reboot" ;;
    arch*) echo "$(as_root "pacman -S nvidia-open nvidia-utils"), then reboot" ;;
    *) echo "install driver 580 or newer (nvidia.com/drivers), then reboot" ;;
  esac
}

# What keeps the card from working, with the remedy for this machine; nothing where the driver lists it.
driver_problem() {
  local smi report="" status=0 first major
  if smi=$(nvidia_smi); then
    report=$(timeout -k 2 20 "$smi" -L 2>&1) || status=$?
    ! grep -q '^GPU [0-9]' <<< "$report" || return 0
    case $status in 124|137) report="it gave no answer in 20 s" ;; esac
  fi
  first=$(head -n 1 <<< "$report")

  if wsl2; then
    echo "nvidia-smi fails in WSL2 ($first): $(driver_command); a Linux driver that was installed inside WSL must be removed"
  elif in_container && [ -z "$smi" ]; then
    echo "an NVIDIA card is in this machine, but this container was not given it: start the container with the card (docker run --gpus all, with NVIDIA's Container Toolkit on the host)"
  elif in_container; then
    echo "nvidia-smi fails in this container ($first): restart the container from the host, and if nvidia-smi fails on the host too, reboot that"
  elif [[ $report = *[Mm]ismatch* ]]; then
    echo "the NVIDIA driver was updated while its old version is still loaded (Driver/library version mismatch): reboot"
  elif [ -z "$smi" ] && [ -r "$at/sys/module/nvidia/version" ]; then
    major=$(cut -d. -f1 "$at/sys/module/nvidia/version")
    case $(distribution) in
      ubuntu*) smi=$(install_command "nvidia-utils-$major") ;;
      fedora*) smi=$(as_root "dnf install -y xorg-x11-drv-nvidia-cuda") ;;
      arch*) smi=$(install_command nvidia-utils) ;;
      *) smi=$(install_command nvidia-smi) ;;
    esac
    echo "the NVIDIA driver is loaded, but nvidia-smi, which belongs to it, is missing: $smi"
  elif [ -z "$smi" ]; then
    echo "an NVIDIA card is here, but not its driver$([ ! -e "$at/sys/module/nouveau" ] || echo " (nouveau, which cannot compute, holds the card)"): $(driver_command)"
  elif [ -e "$at/sys/module/nouveau" ]; then
    echo "nouveau holds the NVIDIA card, so that its driver cannot: $(as_root "sh -c 'echo blacklist nouveau > /etc/modprobe.d/blacklist-nouveau.conf && $(initramfs_command)'"), then reboot"
  elif [[ $report = *"couldn't communicate"* ]]; then
    echo "the NVIDIA driver is installed, but not loaded: $(as_root "modprobe nvidia") says why (module not found: install the headers of kernel $(uname -r) and the driver again; key rejected: Secure Boot must be off or the driver's key enrolled by mokutil)"
  elif [[ $report = *"No devices"* ]]; then
    echo "the NVIDIA driver is loaded, but finds no card that it can use: $(as_root dmesg) has lines with NVRM that say why (an RTX 50 card needs the open kernel modules: $(driver_command); else power cables, the slot)"
  else
    echo "nvidia-smi fails ($first): reboot, and if it still fails, $(driver_command)"
  fi
}

initramfs_command() {
  case $(distribution) in
    fedora*|rhel*) echo "dracut --force" ;;
    arch*) echo "mkinitcpio -P" ;;
    *) echo "update-initramfs -u" ;;
  esac
}

# A line for each card: `driver, memory in MiB, compute capability`. Drivers older than 510 cannot tell the last, and a
# query that asks for it then fails as a whole.
cards() {
  local smi query=(--format=csv,noheader,nounits)
  smi=$(nvidia_smi) || return 0
  timeout -k 2 20 "$smi" --query-gpu=driver_version,memory.total,compute_cap "${query[@]}" ||
    timeout -k 2 20 "$smi" --query-gpu=driver_version,memory.total "${query[@]}" || true
}

# column NUMBER PATTERN: the largest value of a column of `cards` that looks like PATTERN; nothing where none does.
column() { cut -d, -f "$1" | sed 's/ //g' | { grep -Ex "$2" || true; } | sort -rn | head -n 1; }

# What keeps working cards from running the gpu lock; nothing where they can. torch 2.11 carries CUDA 13.
cards_too_old() {
  local cards=$1 driver capability
  driver=$(column 1 '[0-9]+([.][0-9]+)*' <<< "$cards")
  if [ "${driver%%.*}" -lt 580 ] 2>/dev/null; then
    echo "NVIDIA driver $driver is too old for the gpu lock (CUDA 13, driver 580 or newer), and there is no lock for older ones: $(driver_command)"
    return
  fi
  capability=$(column 3 '[0-9]+[.][0-9]+' <<< "$cards")
  [ -z "$capability" ] || [ "${capability/./}" -ge 75 ] ||
    echo "the NVIDIA card here (compute capability $capability) is older than CUDA 13 supports (7.5, the RTX 20 series)"
}

# What keeps cards from the profiles of this repository: 22 GiB (configs/profiles/4090x1.yaml) and bfloat16.
cards_too_small() {
  local cards=$1 mib capability
  mib=$(column 2 '[0-9]+' <<< "$cards")
  if [ -n "$mib" ] && [ $(((mib + 512) / 1024)) -lt 22 ]; then
    echo "the largest NVIDIA card here has $(((mib + 512) / 1024)) GiB, and the profiles take cards of 22 GiB and more"
    return
  fi
  capability=$(column 3 '[0-9]+[.][0-9]+' <<< "$cards")
  [ -z "$capability" ] || [ "${capability/./}" -ge 80 ] ||
    echo "the NVIDIA card here (compute capability $capability) has no bfloat16, in which the profiles compute (8.0 and newer, the RTX 30 series)"
}

# gpu_lock_problem asked|found: the first thing that keeps this machine's cards from the gpu lock, and what to do; nothing
# where they can take it. Who asked for the lock by LOCK=gpu may have cards that only a profile of one's own takes.
gpu_lock_problem() {
  local how=$1 problem cards
  problem=$(driver_problem)
  [ -z "$problem" ] || { echo "$problem; then repeat make setup, or $without_card"; return; }
  cards=$(cards)
  problem=$(cards_too_old "$cards")
  [ -z "$problem" ] || { echo "$problem; or $without_card"; return; }
  [ "$how" != asked ] || return 0
  problem=$(cards_too_small "$cards")
  [ -z "$problem" ] || echo "$problem: $without_card (or, to write a profile of your own, make setup LOCK=gpu)"
}
