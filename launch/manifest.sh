# shellcheck shell=bash
# shellcheck disable=SC2154  # kubernetes.sh, which sources it, sets them
# The manifests of Kubernetes.

# A scalar of YAML.
yaml() {
  printf "'%s'" "$(printf '%s' "$1" | sed "s/'/''/g")"
}

metadata() {
  echo 'metadata:'
  echo "  name: $(yaml "$name")"
  [ -z "$namespace" ] || echo "  namespace: $(yaml "$namespace")"
}

# If a pod fails, all start again; after what no restart mends (2) none does.
job_set() {
  echo 'apiVersion: jobset.x-k8s.io/v1alpha2'
  echo 'kind: JobSet'
  metadata
  # All machines of a TPU slice are in one node pool.
  [ "$tpus" -eq 0 ] || [ "$nodes" -eq 1 ] || cat <<END
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
END
  cat <<END
spec:
  network:
    enableDNSHostnames: true  # a headless service, for the coordinator
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        completions: $nodes
        parallelism: $nodes
        backoffLimit: 0
END
  { mistakes_are_final FailJob; pods "$@"; } | sed 's/^/        /'
}

# Each run starts again by itself.
sweep_job() {
  echo 'apiVersion: batch/v1'
  echo 'kind: Job'
  metadata
  cat <<END
spec:
  completionMode: Indexed
  completions: $sweep
  parallelism: $sweep
  backoffLimitPerIndex: $restarts
END
  { mistakes_are_final FailIndex; pods "$@"; } | sed 's/^/  /'
}

mistakes_are_final() {
  cat <<END
podFailurePolicy:
  rules:
  - action: $1
    onExitCodes: {operator: In, values: [2]}
END
}

pods() {
  local argument
  cat <<END
template:
  spec:
    restartPolicy: Never
    terminationGracePeriodSeconds: 120  # to save in
END
  [ -z "$labels" ] || printf '    nodeSelector:\n%s' "$labels"
  cat <<END
    containers:
    - name: djpq
      image: $(yaml "$image")
      command: [djpq, train]
      args:
END
  for argument in "$@"; do echo "      - $(yaml "$argument")"; done
  [ "$gpus" -eq 0 ] || echo "      resources: {limits: {nvidia.com/gpu: $gpus}}"
  [ "$tpus" -eq 0 ] || echo "      resources: {limits: {google.com/tpu: $tpus}}"
  [ -z "$volume" ] || cat <<END
      volumeMounts: [{name: data, mountPath: /data}]
    volumes:
    - {name: data, persistentVolumeClaim: {claimName: $(yaml "$volume")}}
END
}
