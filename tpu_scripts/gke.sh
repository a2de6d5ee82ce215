#!/usr/bin/env bash
# Prints a JobSet manifest that trains on TPU slices of a GKE cluster; with --xpk, the xpk command line that does the same.
#
#   gke.sh --name mine --type 2xv5e-16 --image IMAGE --config my.py -- --run.dir gs://bucket/run > job.yaml
#   gke.sh --xpk --cluster c --name mine --zone us-west4-a --type 2xv5e-16 --image IMAGE --config gemma2_9b.py -- --run.dir gs://bucket/run
#
# The cluster needs JobSet 0.6 or newer and a node pool per slice; the image needs python with jaxft[tpu], for example
# `FROM python:3.12-slim`, `COPY . /jaxft`, `RUN pip install /jaxft[tpu]`.
#
#   --image IMAGE             needed
#   --config FILE             a file here travels in the manifest; otherwise the name of one in jaxft's configs/
#   --namespace NAME          default: default
#   --service-account NAME    of Kubernetes, allowed to write to the bucket
#   --token-secret NAME       the Secret whose key `token` is HF_TOKEN: kubectl create secret generic NAME --from-file=token=FILE
#   --max-restarts N          of all slices together, after preemption or a failure; default 50. A user's mistake (2) and
#                             lack of memory or disk (3) end the job at once
#   --spot                    nodes of a Spot pool; --reservation NAME: nodes of a reservation
#   --xpk, --cluster NAME     needs --zone; --token-secret and a local --config do not go through xpk

# shellcheck source=tpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

opt_image='' opt_config='' opt_namespace=default opt_service_account='' opt_token_secret='' opt_max_restarts=50 opt_spot=''
opt_reservation='' opt_xpk='' opt_cluster=''
tpu_parse "$FLAGS image config namespace service-account token-secret max-restarts reservation cluster" "$SWITCHES spot xpk" "" "$@"
opt_zone=${opt_zone:-any-a}
[ -z "$opt_xpk" ] || [ "$opt_zone" != any-a ] || tpu_wrong "--zone: in which zone is the cluster?"
tpu_check
[ -n "$opt_type" ] || tpu_wrong "--type: which slice, such as v5e-8 or 2xv5e-16?"
[ "${#opt_name}" -le 40 ] || tpu_wrong "--name: at most 40 letters here: Kubernetes appends to it"
[ -n "$opt_image" ] || tpu_wrong "--image: which container image?"
[ -n "$opt_config" ] || tpu_wrong "--config: which config, such as gemma2_9b.py?"
tpu_matches "$opt_max_restarts" '[0-9]{1,6}' max-restarts "a whole number"
for flag in namespace service_account token_secret reservation cluster; do
  value=opt_$flag
  [ -z "${!value}" ] || tpu_matches "${!value}" '[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?' "${flag//_/-}" "a Kubernetes name"
done
tpu_matches "$opt_image" '[A-Za-z0-9][-A-Za-z0-9._/:@]*' image "a container image"

if [ -n "$opt_xpk" ]; then
  [ -n "$opt_cluster" ] || tpu_wrong "--cluster: which cluster?"
  [ ! -f "$opt_config" ] && [ -z "$opt_token_secret" ] || tpu_wrong "--xpk: a local --config and --token-secret do not go through it"
  COMMAND=(xpk workload create --cluster "$opt_cluster" --workload "$opt_name" "--tpu-type=$ACCELERATOR" "--num-slices=$SLICES"
    "--docker-image=$opt_image" "--max-restarts=$opt_max_restarts" "--zone=$opt_zone")
  [ -z "$opt_project" ] || COMMAND+=("--project=$opt_project")
  COMMAND+=("--command=$(tpu_remote python -u -m jaxft.train --config "$opt_config" ${REST[@]+"${REST[@]}"})")
  tpu_line "${COMMAND[@]}"
  exit 0
fi

# A string as YAML and JSON both read it back. Bytes are looked at one by one, so that no locale has a say; what YAML takes
# for a line break or refuses (C0, DEL, C1, U+2028, U+2029, U+FEFF) is written as its number.
yaml() {
  local LC_ALL=C text=$1 out='' byte next number i
  for ((i = 0; i < ${#text}; i++)); do
    byte=${text:i:1} next=${text:i:3}
    case $next in
      $'\xe2\x80\xa8') out+='\u2028' i=$((i + 2)) && continue ;;
      $'\xe2\x80\xa9') out+='\u2029' i=$((i + 2)) && continue ;;
      $'\xef\xbb\xbf') out+='\ufeff' i=$((i + 2)) && continue ;;
      $'\xc2'[$'\x80'-$'\x9f']*)
        number=$(printf %s "${text:i+1:1}" | od -An -tx1 | tr -d ' \n')
        out+="\\u00$number" i=$((i + 1)) && continue
        ;;
    esac
    case $byte in
      '"' | \\) out+="\\$byte" ;;
      [[:cntrl:]]) printf -v number '\\u%04x' "'$byte" && out+=$number ;;
      *) out+=$byte ;;
    esac
  done
  printf '"%s"' "$out"
}

command=(python -u -m jaxft.train --config "$opt_config" ${REST[@]+"${REST[@]}"})
if [ -f "$opt_config" ]; then
  file=${opt_config##*/}
  tpu_matches "$file" '[-._A-Za-z0-9]{1,253}' config "a file's name of letters, digits, - . and _, which a ConfigMap takes"
  command[5]=/config/$file
  content=$(cat "$opt_config" && printf .)
  cat <<END
apiVersion: v1
kind: ConfigMap
metadata:
  name: $opt_name-config
  namespace: $opt_namespace
data:
  "$file": $(yaml "${content%.}")
---
END
fi
words=''
for word in "${command[@]}"; do
  word=$(yaml "$word" && printf .)
  word=${word%.}
  words="$words${words:+, }${word//\$/\$\$}" # Kubernetes reads \$(X) as a variable, and \$\$ as a \$
done
cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $opt_name
  namespace: $opt_namespace
  labels:
    jaxft: $opt_name
    jaxft_owner: "$OWNER"
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool # a slice is a node pool
spec:
  network:
    enableDNSHostnames: true # the headless service by which the workers find each other
  failurePolicy:
    maxRestarts: $opt_max_restarts # all slices start again together, and resume
    rules:
      - name: final
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          completionMode: Indexed
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob # a mistake of the user's, memory, disk: another start ends the same
                onExitCodes:
                  containerName: jaxft
                  operator: In
                  values: [2, 3]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120 # to save in, on SIGTERM; Spot nodes give less
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $GKE_ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
END
[ -z "$opt_spot" ] || echo '                cloud.google.com/gke-spot: "true"'
[ -z "$opt_reservation" ] || echo "                cloud.google.com/reservation-name: \"$opt_reservation\""
[ -z "$opt_service_account" ] || echo "              serviceAccountName: \"$opt_service_account\""
cat <<END
              containers:
                - name: jaxft
                  image: "$opt_image"
                  command: [$words]
                  ports:
                    - containerPort: 8471 # between the workers of a slice
                    - containerPort: 8080 # between slices
                  resources:
                    requests:
                      google.com/tpu: $HOST_CHIPS
                    limits:
                      google.com/tpu: $HOST_CHIPS
END
if [ -n "$opt_token_secret" ]; then
  cat <<END
                  env:
                    - name: HF_TOKEN
                      valueFrom:
                        secretKeyRef:
                          name: "$opt_token_secret"
                          key: token
END
fi
if [ -f "$opt_config" ]; then
  cat <<END
                  volumeMounts:
                    - name: config
                      mountPath: /config
              volumes:
                - name: config
                  configMap:
                    name: $opt_name-config
END
fi
