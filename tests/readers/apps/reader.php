<?php
// Reader: PHP as a bare script sees a request, with what Symfony and Laravel do about methods and forms that PHP itself
// does not read, and the usual json_decode of the whole body. The report is described in report.rb.

const NAMES = ['private_token', 'sudo', 'access_token', 'bearer_token', 'job_token', '_method', 'page', 'per_page'];
const OTHERS = ['AUTHORIZATION', 'SUDO', 'JOB_TOKEN', 'DEPLOY_TOKEN', 'X_HTTP_METHOD_OVERRIDE', 'COOKIE'];

function value($value)
{
    if (!is_string($value)) {
        return ['odd' => substr(json_encode($value, JSON_PARTIAL_OUTPUT_ON_ERROR | JSON_INVALID_UTF8_SUBSTITUTE), 0, 100)];
    }
    $text = substr($value, 0, 100);
    return preg_match('//u', $text) ? $text : ['odd' => bin2hex($text)];
}

function pick(string $source, $params): array
{
    $seen = [];
    foreach (NAMES as $name) {
        if (is_array($params) && isset($params[$name])) {
            $seen[] = [$source, $name, value($params[$name])];
        }
    }
    return $seen;
}

$sent = $_SERVER['REQUEST_METHOD'];
$body = file_get_contents('php://input');
$type = $_SERVER['CONTENT_TYPE'] ?? '';
$form = $_POST;
// As Request::createFromGlobals of Symfony does.
if (str_starts_with($type, 'application/x-www-form-urlencoded') && in_array($sent, ['PUT', 'DELETE', 'PATCH'], true)) {
    parse_str($body, $form);
}
$json = json_decode($body, true);

$seen = array_merge(pick('query', $_GET), pick('form', $form), pick('file', $_FILES), pick('json', $json));
if (!$seen) {
    $seen = pick('request', $_REQUEST);
}
$fields = count($form) + count($_FILES) + (is_array($json) ? count($json) : 0);

// As Request::getMethod of Symfony does, with the override by parameter switched on.
$method = $sent;
if ($sent === 'POST') {
    $override = $_SERVER['HTTP_X_HTTP_METHOD_OVERRIDE'] ?? $form['_method'] ?? $_GET['_method'] ?? 'POST';
    $method = is_string($override) ? strtoupper($override) : 'POST';
}

$others = [];
foreach (OTHERS as $name) {
    if (isset($_SERVER["HTTP_$name"])) {
        $others[] = [$name, value($_SERVER["HTTP_$name"])];
    }
}
$header = isset($_SERVER['HTTP_PRIVATE_TOKEN']) ? value($_SERVER['HTTP_PRIVATE_TOKEN']) : null;
$report = ['m' => $method, 'h' => $header, 'x' => $others, 's' => $seen, 'n' => $fields, 'e' => null];
if ($seen) {
    $line = json_encode(['id' => $_SERVER['HTTP_X_REQUEST_ID'] ?? null, 'r' => $report]) . "\n";
    file_put_contents(getenv('READER_LOG'), $line, FILE_APPEND | LOCK_EX);
}
header('Content-Type: application/json');
header('X-Seen: ' . json_encode($report));
header('X-Path: ' . preg_replace_callback('/[^\x21-\x7e]/', fn ($byte) => sprintf('%%%02X', ord($byte[0])), $_SERVER['DOCUMENT_URI']));
echo '{}';
