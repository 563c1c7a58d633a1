# env.sh: the environment of ranks. Sourced on every node before torchrun. What is set already is kept, so that a cluster's
# own settings (`env:` of configs/cluster/*.yaml) win.

# NCCL says why it failed, with the address of the peer, and nothing else.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# The flight recorder: the last 2,000 collectives of every rank, written to node-local files when one times out: the only
# record of which rank did not come to a collective.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-/tmp/nccl-trace-${SLURM_JOB_ID:-local}-}"

# gloo asks the resolver for this host's own name and takes what it gets, on many clusters 127.0.1.1 or the slow management
# network. The interface that leads to the first node is one that the nodes reach each other by. NCCL finds InfiniBand by
# itself and needs an interface only for its first handshake.
if [ -n "${MASTER_ADDR:-}" ] && command -v ip >/dev/null; then
  address=$(getent ahostsv4 "$MASTER_ADDR" | head -n 1 | cut -d' ' -f1)
  leads_there=$(ip -o route get "$address" 2>/dev/null | grep -o ' dev [^ ]*' | cut -d' ' -f3)
  if [ "$leads_there" = lo ]; then # this is the first node: the interface that carries the address, lo only for a loopback
    leads_there=$(ip -o addr show to "$address" 2>/dev/null | head -n 1 | tr -s ' ' | cut -d' ' -f2)
    leads_there=${leads_there:-lo}
    case "$address" in 127.0.1.*) leads_there= ;; esac # Debian's entry for the own name: it says nothing of the network
  fi
  if [ -n "$leads_there" ]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$leads_there}"
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$leads_there}" # with "=" the name itself, else all that begin with it
  fi
fi

# torch starts one thread per core in every rank: 8 ranks of a 96-core node would run 768. On GPUs the threads have little to do.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Tokenizers are not used by ranks; where one is, its threads must not be forked.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Compiled kernels go to the node's own disk: a home folder on NFS is slow, and ranks of all nodes would race in it. Code is loaded
# from there, so the folder must be ours alone: one that somebody else made beforehand, or a link, is left for a new one.
own_cache() {
  local folder="${TMPDIR:-/tmp}/megatron-synth-$(id -u)"
  mkdir -m 700 "$folder" 2>/dev/null || true # it may be there
  if [ -L "$folder" ] || [ ! -d "$folder" ] || [ ! -O "$folder" ] || [ -n "$(find "$folder" -prune -perm /022)" ]; then
    folder=$(mktemp -d)
  fi
  printf '%s' "$folder"
}
if [ -z "${TRITON_CACHE_DIR:-}" ] || [ -z "${TORCHINDUCTOR_CACHE_DIR:-}" ]; then
  cache=$(own_cache)
  export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$cache/triton}"
  export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}"
  unset cache
fi
unset -f own_cache

# A crash inside a library prints the Python stack instead of nothing.
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"

# No core dumps: one of a GPU rank is as large as its memory, and all ranks crash together.
ulimit -S -c 0

# Every rank of the job connects to the store on the first node: 1,024 files, the usual limit, are 1,000 ranks.
ulimit -S -n "$(ulimit -H -n)"
